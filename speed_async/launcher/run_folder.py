"""The run folder and the paths of its files."""

import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.load import save_config
from speed_async.config.resumed import CONFIG_FILE
from speed_async.config.schema import Config
from speed_async.config.whole_file import flush, write_atomically
from speed_async.errors import ConfigError, SpeedAsyncError

LOCK_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def attempt(self) -> Path:
        """Number of the current attempt."""
        return self.path / "attempt.json"

    @property
    def identity(self) -> Path:
        """Digests of the run's inputs (identity.py)."""
        return self.path / "identity.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def address(self) -> Path:
        return self.path / "address.json"

    def log(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.log"

    def error(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.error"

    def failed(self, role: str) -> Path:
        """Completions that this actor's verifier failed to score."""
        return self.path / "failed" / f"{role}.jsonl"

    def write_summary(self, fields: dict[str, object]) -> None:
        self.write(self.summary, json.dumps(fields, indent=2) + "\n")

    def write(self, path: Path, text: str) -> None:
        """Write a file of this folder atomically. Raises OSError."""
        write_atomically(path, text)

    def take_lock(self, grace_s: float) -> int:
        """Lock the run exclusively; returns an open descriptor that child processes do not inherit.

        Raises SpeedAsyncError when another process still holds the lock after `grace_s`.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        ends_s = time.monotonic() + grace_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < ends_s:
                    time.sleep(LOCK_POLL_S)
                    continue
                os.close(descriptor)
                raise SpeedAsyncError(
                    f"the run in '{self.path}' is in progress: stop it first (Ctrl-C), or start a "
                    "new run in another folder"
                ) from None
            return descriptor

    def release_lock(self, descriptor: int) -> None:
        os.close(descriptor)


def numbered(wanted: Path) -> Iterator[Path]:
    """`wanted`, then wanted-2, wanted-3, ...: the order in which a run tries its folders."""
    yield wanted
    for number in itertools.count(2):
        yield wanted.with_name(f"{wanted.name}-{number}")


def make_run_folder(config: Config) -> tuple[RunFolder, Config]:
    """Create the configured folder, or the first free one of folder-2, folder-3, ...

    Returns it with the configuration updated to its path, which is also saved there. Raises
    ConfigError.
    """
    wanted = Path(config.run.folder).expanduser().resolve()
    try:
        str(wanted).encode()  # the path is sent to other processes as text
    except UnicodeEncodeError:
        raise ConfigError(
            "run.folder", ascii(config.run.folder), "its path is not UTF-8: use another folder"
        ) from None
    try:
        path = next(each for each in numbered(wanted) if _claim(each))
    except OSError as error:
        raise ConfigError(
            "run.folder", config.run.folder, f"cannot be created ({error.strerror})"
        ) from None
    folder = RunFolder(path=path)
    run = config.run.model_copy(update={"folder": str(path)})
    resolved = config.model_copy(update={"run": run})
    save_config(resolved, folder.config)
    flush(path.parent)
    return folder, resolved


def _claim(path: Path) -> bool:
    """Claim the folder; False if it is in use. Of two concurrent calls exactly one succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.is_dir() and not any(path.iterdir())):
        try:
            path.mkdir()
        except FileExistsError:
            return False
    try:
        (path / "logs").mkdir()
    except FileExistsError:
        return False
    return True
