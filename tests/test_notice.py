"""Where the ranks of one node find their run: who may write it, and what a stale one does."""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from speed_async.errors import SpeedAsyncError
from speed_async.launcher.rendezvous import (
    FOLDER_VARIABLE,
    RendezvousFile,
    RendezvousRecord,
    node_rendezvous,
)
from speed_async.launcher.roles.join import ask_for_place
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.zeromq import open_hub


@pytest.fixture
def under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of ranks that a launcher other than ours has started."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return tmp_path


def test_ranks_that_are_started_again_know_where_their_run_began(under_torchrun: Path) -> None:
    node_rendezvous().write(RendezvousRecord(run_folder="/runs/a", host="127.0.0.1", port=7))
    assert node_rendezvous().read() == RendezvousRecord(
        run_folder="/runs/a", host="127.0.0.1", port=7
    )


def test_what_lies_there_is_this_user_s_alone(under_torchrun: Path) -> None:
    file = node_rendezvous()
    file.write(RendezvousRecord())
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert file.path.parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_folder_that_another_may_have_made_is_not_trusted(
    under_torchrun: Path, kind: str
) -> None:
    folder = under_torchrun / f"speed_async-{os.getuid()}"
    if kind == "a link":
        (under_torchrun / "theirs").mkdir(mode=0o700)
        folder.symlink_to(under_torchrun / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(SpeedAsyncError, match=f"'{folder}' is not a folder of this user alone"):
        node_rendezvous()


def test_another_launcher_s_ranks_read_another_file(under_torchrun: Path) -> None:
    """Also one that has the same process number, later."""
    node_rendezvous().write(RendezvousRecord(run_folder="/runs/a"))
    code = (
        f"import tempfile; tempfile.tempdir = {str(under_torchrun)!r}\n"
        "from speed_async.launcher.rendezvous import node_rendezvous\n"
        "print(node_rendezvous().read())"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240
    )
    assert theirs.stdout == f"{RendezvousRecord()}\n", theirs.stderr


def test_ranks_that_torchrun_started_again_do_not_begin_another_run_in_silence(
    under_torchrun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SpeedAsyncError, match="is gone: start with --resume RUN_DIR"):
        node_rendezvous()


def test_an_address_of_an_earlier_life_is_left_for_this_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers at the old one; the notice is looked at again."""
    monkeypatch.setattr("speed_async.launcher.roles.join.ASK_AGAIN_S", 0.2)
    file = RendezvousFile(tmp_path / "node")
    file.write(RendezvousRecord(host="127.0.0.1", port=9))

    def where() -> tuple[str, int] | None:
        notice = file.read()
        return notice.host, notice.port

    async def find() -> tuple[int, str, JoinAccepted, Join]:
        hub = await open_hub("127.0.0.1", 0)
        finding = asyncio.create_task(
            ask_for_place(where, stopping=asyncio.Event(), timeout_s=30.0, keys=None, rank=3)
        )
        done, _ = await asyncio.wait((finding,), timeout=0.5)
        assert not done
        file.write(RendezvousRecord(host="127.0.0.1", port=hub.port))
        peer, join = await hub.receive(30.0)
        hub.offer(peer, JoinAccepted(index=3, config="{}", feed_port=1, incarnation=1000))
        place = await finding
        assert place is not None
        await place.link.close()
        await hub.close()
        assert isinstance(join, Join)
        return place.port - hub.port, peer, place.accepted, join

    same_port, peer, accepted, join = asyncio.run(find())
    assert same_port == 0
    assert peer.startswith("actor-3.")
    assert accepted.incarnation == 1000
    assert (join.has_rank, join.rank) == (True, 3)
