"""What the ranks of one node tell each other and their launcher: a file that only this user reads.

The leading learner writes where its run is and where its service listens; the other ranks of its
node look there. It outlives ranks that are started again, which is how a learner knows in which
folder to go on. Our launcher names the folder; under torchrun, whose ranks are children of one
process, the folder is that process's.
"""

import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from speed_async.errors import SpeedAsyncError

FOLDER_VARIABLE = "SPEED_ASYNC_LAUNCH_FOLDER"
NOTICE_FILE = "notice.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RendezvousRecord:
    run_folder: str = ""
    """Empty until the run has one."""
    host: str = ""
    port: int = 0
    """Of the service; 0 while there is none."""
    nothing_to_do: bool = False
    """The run was finished before these ranks came: nobody will serve them."""
    outcome: str = ""
    """How the run ended, as a node without the learner heard it; empty before."""
    reason: str = ""


class RendezvousFile:
    def __init__(self, folder: Path) -> None:
        """`folder` is made where it is missing. Raises SpeedAsyncError when others can write it."""
        _make_private(folder)
        self.path = folder / NOTICE_FILE

    def read(self) -> RendezvousRecord:
        """An empty one before anything was written."""
        try:
            return RendezvousRecord(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return RendezvousRecord()

    def write(self, notice: RendezvousRecord) -> None:
        pending = self.path.with_name(f"{os.getpid()}.partial")
        pending.write_text(json.dumps(asdict(notice)))
        pending.replace(self.path)

    def change(self, **changes: str | int | bool) -> None:
        self.write(replace(self.read(), **changes))


def node_rendezvous() -> RendezvousFile:
    """The file of this rank's node. Raises SpeedAsyncError.

    Ranks that torchrun has started again find what they wrote before; if it is gone, they do not
    know which run they belong to, and a new one must not begin in silence.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return RendezvousFile(Path(folder))
    private = Path(tempfile.gettempdir()) / f"speed_async-{os.getuid()}"
    _make_private(private)
    notice = RendezvousFile(private / _parent_name())
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and not notice.path.is_file():
        raise SpeedAsyncError(
            f"torchrun has started these ranks again, and '{notice.path}', where they noted which "
            "run they belong to, is gone: start with --resume RUN_DIR"
        )
    return notice


def _parent_name() -> str:
    """Names this process's parent as nothing else that ever has its number."""
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
            f"the folder '{folder}', where ranks find each other, cannot be used "
            f"({error.strerror}): set TMPDIR to a folder that can be written"
        ) from None
    is_folder = stat.S_ISDIR(found.st_mode)
    if not is_folder or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SpeedAsyncError(
            f"'{folder}' is not a folder of this user alone, and what lies there cannot be "
            "trusted: remove it, or set TMPDIR to a folder of your own"
        )
