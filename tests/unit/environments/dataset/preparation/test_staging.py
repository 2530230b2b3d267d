import os
import signal
from pathlib import Path

import pytest

from speed_async.environments.dataset.preparation.staging import staged_folder
from speed_async.errors import DataError


def write(out: Path, text: str) -> None:
    with staged_folder(out) as folder:
        (folder / "rows").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "old")
    (out / "more").touch()
    write(out, "new")
    assert entries(out) == ["rows"] and (out / "rows").read_text() == "new"
    assert entries(out.parent) == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(OSError, match="full"), staged_folder(out) as folder:
        (folder / "rows").write_text("half")
        raise OSError("full")
    assert (out / "rows").read_text() == "old" and entries(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_not_taken_for_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with staged_folder(out) as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists() and entries(tmp_path / ".out.partial") == ["half"]
    write(out, "whole")
    assert entries(out) == ["rows"] and entries(tmp_path) == ["out"]


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out) as folder:
        (folder / "rows").write_text("first")
        with pytest.raises(DataError, match="another process is writing"):
            write(out, "second")
    assert (out / "rows").read_text() == "first"
