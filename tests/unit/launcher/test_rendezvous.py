"""The rendezvous file of one node's ranks: permissions, restarts, and outdated addresses."""

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
from speed_async.launcher.roles.join import request_admission
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.zeromq import open_hub


@pytest.fixture
def under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of ranks started by torchrun."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return tmp_path


def test_restarted_ranks_read_the_run_folder_of_their_run(under_torchrun: Path) -> None:
    node_rendezvous().write(RendezvousRecord(run_folder="/runs/a", host="127.0.0.1", port=7))
    assert node_rendezvous().read() == RendezvousRecord(
        run_folder="/runs/a", host="127.0.0.1", port=7
    )


def test_rendezvous_folders_are_private(under_torchrun: Path) -> None:
    file = node_rendezvous()
    file.write(RendezvousRecord())
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert file.path.parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_folder_accessible_to_other_users_is_rejected(under_torchrun: Path, kind: str) -> None:
    folder = under_torchrun / f"speed_async-{os.getuid()}"
    if kind == "a link":
        (under_torchrun / "other").mkdir(mode=0o700)
        folder.symlink_to(under_torchrun / "other")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(SpeedAsyncError, match=f"'{folder}' is not a private folder of this user"):
        node_rendezvous()


def test_ranks_of_another_launcher_read_another_file(under_torchrun: Path) -> None:
    """This includes a later launcher with the same process id."""
    node_rendezvous().write(RendezvousRecord(run_folder="/runs/a"))
    code = (
        f"import tempfile; tempfile.tempdir = {str(under_torchrun)!r}\n"
        "from speed_async.launcher.rendezvous import node_rendezvous\n"
        "print(node_rendezvous().read())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240
    )
    assert other.stdout == f"{RendezvousRecord()}\n", other.stderr


def test_restarted_ranks_without_a_record_do_not_start_a_new_run(
    under_torchrun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SpeedAsyncError, match="is gone: start with --resume RUN_DIR"):
        node_rendezvous()


def test_outdated_address_is_replaced_by_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process listens at the old address; the record is read again."""
    monkeypatch.setattr("speed_async.launcher.roles.join.ASK_AGAIN_S", 0.2)
    file = RendezvousFile(tmp_path / "node")
    file.write(RendezvousRecord(host="127.0.0.1", port=9))

    def look_up() -> tuple[str, int] | None:
        record = file.read()
        return record.host, record.port

    async def find() -> tuple[int, str, JoinAccepted, Join]:
        hub = await open_hub("127.0.0.1", 0)
        finding = asyncio.create_task(
            request_admission(look_up, stopping=asyncio.Event(), timeout_s=30.0, keys=None, rank=3)
        )
        done, _ = await asyncio.wait((finding,), timeout=0.5)
        assert not done
        file.write(RendezvousRecord(host="127.0.0.1", port=hub.port))
        peer, join = await hub.receive(30.0)
        hub.offer(peer, JoinAccepted(index=3, config="{}", feed_port=1, incarnation=1000))
        admitted = await finding
        assert admitted is not None
        await admitted.link.close()
        await hub.close()
        assert isinstance(join, Join)
        return admitted.port - hub.port, peer, admitted.accepted, join

    port_difference, peer, accepted, join = asyncio.run(find())
    assert port_difference == 0
    assert peer.startswith("actor-3.")
    assert accepted.incarnation == 1000
    assert (join.has_rank, join.rank) == (True, 3)
