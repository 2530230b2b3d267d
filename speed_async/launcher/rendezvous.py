"""Rendezvous of the ranks of one node with each other and their launcher: a private file.

Rank 0 writes the run folder and the address of the service; the other ranks of its node read it.
The file survives a restart of the ranks, so that rank 0 knows which run to continue. The launcher
sets the folder of the file; under torchrun it is derived from torchrun's process, the parent of all
ranks.
"""

import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from speed_async.errors import SpeedAsyncError

FOLDER_VARIABLE = "SPEED_ASYNC_LAUNCH_FOLDER"
RECORD_FILE = "rendezvous.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RendezvousRecord:
    run_folder: str = ""
    """Empty until the run folder is created."""
    host: str = ""
    port: int = 0
    """Port of the service; 0 until it listens."""
    learner_port: int = 0
    """Port at which rank 0 waits for other learner ranks; 0 until it listens."""
    nothing_to_do: bool = False
    """The run was already finished when these ranks started: no service will start."""
    outcome: str = ""
    """Outcome of the run, recorded on nodes without the learner; empty until the run ends."""
    reason: str = ""


class RendezvousFile:
    def __init__(self, folder: Path) -> None:
        """Creates `folder` if missing. Raises SpeedAsyncError if other users can access it."""
        _make_private(folder)
        self.path = folder / RECORD_FILE

    def read(self) -> RendezvousRecord:
        """Return the record; an empty one if none was written."""
        try:
            return RendezvousRecord(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return RendezvousRecord()

    def write(self, record: RendezvousRecord) -> None:
        pending = self.path.with_name(f"{os.getpid()}.partial")
        pending.write_text(json.dumps(asdict(record)))
        pending.replace(self.path)

    def change(self, **changes: str | int | bool) -> None:
        self.write(replace(self.read(), **changes))


def node_rendezvous() -> RendezvousFile:
    """Open the file of this rank's node. Raises SpeedAsyncError.

    Ranks restarted by torchrun read the record of the previous attempt. If it is missing, the run
    to continue is not known, and this is an error: a new run must not start silently.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return RendezvousFile(Path(folder))
    rendezvous = RendezvousFile(private_folder() / _parent_name())
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and not rendezvous.path.is_file():
        raise SpeedAsyncError(
            f"torchrun has restarted these ranks, and '{rendezvous.path}', which identifies their "
            "run, is gone: start with --resume RUN_DIR"
        )
    return rendezvous


def private_folder() -> Path:
    """This user's folder for processes of this machine. Raises SpeedAsyncError if other users can
    access it."""
    folder = Path(tempfile.gettempdir()) / f"speed_async-{os.getuid()}"
    _make_private(folder)
    return folder


def _parent_name() -> str:
    """A name for the parent process that is unique even when its process id is reused."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = "0"
    return f"{parent}-{began}"


def _make_private(folder: Path) -> None:
    """Raises SpeedAsyncError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SpeedAsyncError(
            f"the rendezvous folder '{folder}' cannot be used ({error.strerror}): set TMPDIR to a "
            "writable folder"
        ) from None
    is_folder = stat.S_ISDIR(found.st_mode)
    if not is_folder or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SpeedAsyncError(
            f"'{folder}' is not a private folder of this user, and its content cannot be trusted: "
            "remove it, or set TMPDIR to a private folder"
        )
