"""Injects faults into a run, and ends those with a duration."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from speed_async.buffer.durability.journal import read_segment
from tests.faults.disk import LimitedFiles, SmallDisk
from tests.faults.faults import Fault
from tests.faults.lost_records import LostRecords
from tests.faults.proxy import Proxy
from tests.faults.targets import Targets

TARGET_DEADLINE_S = 240.0
"""How long to wait for a target that is being restarted."""
NEWEST_RECORDS_BYTES = 4096
"""Maximum number of bytes cut from a journal's tail."""


class NoTarget(Exception):
    """The target of a fault does not exist (e.g. no checkpoint yet): the fault is skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injector:
    targets: Targets
    proxy: Proxy
    disk: SmallDisk | LimitedFiles
    run_folder: Path
    num_actors: int
    peer_timeout_s: float
    lost: LostRecords = field(default_factory=LostRecords)
    """Records cut from the journal, for the checks."""

    @property
    def limits_files(self) -> bool:
        """Whether no separate disk could be mounted, and file sizes are limited instead."""
        return isinstance(self.disk, LimitedFiles)

    def inject(self, fault: Fault) -> str:
        """Inject the fault, wait for its end if it has a duration, and return a description.

        Raises NoTarget.
        """
        verb, _, what = fault.kind.partition(" ")
        match verb, what:
            case "kill", "all":
                return self._kill_all()
            case "kill", _:
                return self._kill(self._pick(what, fault.share))
            case "stop", _:
                return self._stop(self._pick(what, fault.share), 0.2 + fault.share)
            case "hang", _:
                stopped_s = self.peer_timeout_s + 0.5 + 1.5 * fault.share
                return self._stop(self._pick(what, fault.share), stopped_s)
            case _, "links":
                return self._links(verb, fault.share)
            case "fill", "disk":
                return self._fill(0.5 + 2.0 * fault.share)
            case "truncate", "journal":
                return self._truncate(fault.share)
            case "damage", "checkpoint":
                return self._damage(fault.share)
        raise ValueError(f"unknown kind of fault: '{fault.kind}'")

    # --- processes -------------------------------------------------------------------------

    def _pick(self, what: str, share: float) -> str:
        """Name of the target. Among several, `share` selects one."""
        if what in ("service", "learner"):
            return what
        return f"{what}-{1 + int(share * 1e6) % self.num_actors}"

    def _process(self, name: str) -> int:
        deadline_s = time.monotonic() + TARGET_DEADLINE_S
        while (process_id := self.targets.all().get(name)) is None:
            if time.monotonic() > deadline_s:
                raise NoTarget(f"no {name} for {TARGET_DEADLINE_S:.0f} s")
            time.sleep(0.05)
        return process_id

    def _kill(self, name: str) -> str:
        _signal(self._process(name), signal.SIGKILL)
        return name

    def _kill_all(self) -> str:
        """Kill all processes at once, except the launcher, which restarts them."""
        for process_id in self.targets.all().values():
            _signal(process_id, signal.SIGKILL)
        return "all roles"

    def _stop(self, name: str, stopped_s: float) -> str:
        with self._stopped(name):
            time.sleep(stopped_s)
        return f"{name} for {stopped_s:.1f} s"

    @contextmanager
    def _stopped(self, name: str) -> Iterator[None]:
        process_id = self._process(name)
        _signal(process_id, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(process_id, signal.SIGCONT)

    # --- links -----------------------------------------------------------------------------

    def _links(self, verb: str, share: float) -> str:
        """Cut once, or for a while: refused past the peer timeout, delayed, or stalled."""
        actions: dict[str, tuple[Callable[[], None], float]] = {
            "cut": (self.proxy.cut, 0.0),
            "refuse": (self.proxy.refuse, 0.3 + share * self.peer_timeout_s),
            "delay": (lambda: self.proxy.delay(0.02 + 0.3 * share), 2.0),
            "stall": (self.proxy.stall, 0.3 + share * 2 * self.peer_timeout_s),
        }
        action, duration_s = actions[verb]
        action()
        try:
            time.sleep(duration_s)
        finally:
            self.proxy.restore()
        return f"{self.proxy.num_accepted} connections so far, {duration_s:.1f} s"

    # --- files -----------------------------------------------------------------------------

    def _fill(self, duration_s: float) -> str:
        writers = [self._process("service")]  # the others' traces are elsewhere and must continue
        self.disk.fill(writers)
        try:
            time.sleep(duration_s)
        finally:
            self.disk.free(writers)
        return f"{type(self.disk).__name__} for {duration_s:.1f} s"

    def _truncate(self, share: float) -> str:
        """Kill the service and cut its journal while the process that restarts it is stopped."""
        service = self._process("service")  # found before the learner that restarts it is stopped
        with self._stopped("learner"):
            _signal(service, signal.SIGKILL)
            _wait_until_gone(service)
            segment = self._newest(self.run_folder / "journal", lambda path: path.is_file())
            size = _end_of_records(segment)
            lost = min(size, 1 + int(share * NEWEST_RECORDS_BYTES))
            self.lost.add(segment, size - lost)
            os.truncate(segment, size - lost)
        return f"{lost} bytes of {segment.name}"

    def _damage(self, share: float) -> str:
        """Change one byte in a file of the newest checkpoint, and kill the learner."""
        folder = self.run_folder / "checkpoints"
        if not folder.is_dir() or sum(_is_checkpoint(path) for path in folder.iterdir()) < 2:
            raise NoTarget("fewer than two checkpoints")
        with self._stopped("learner"):
            learner = self._process("learner")
            newest = self._newest(folder, _is_checkpoint)
            training = newest / "training"
            files = [
                *sorted(newest.glob("*.safetensors")),
                training / "optimizer.tensors",
                training / "trainer.json",
            ]
            target = random.Random(share).choice(files)
            with target.open("r+b") as file:
                file.seek(int(share * target.stat().st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 0xFF]))
            _signal(learner, signal.SIGKILL)
        return f"{newest.name}/{target.name}"

    def _newest(self, folder: Path, wanted: Callable[[Path], bool]) -> Path:
        found = [path for path in folder.glob("*") if wanted(path)] if folder.is_dir() else []
        if not found:
            raise NoTarget(f"no matching file in {folder}")
        return max(found, key=lambda path: path.name)


def _end_of_records(segment: Path) -> int:
    """End of the last record. Padding of a killed service may follow; cutting it has no effect."""
    ends = [record.end for _, record in read_segment(segment.parent, int(segment.stem))]
    return ends[-1] if ends else segment.stat().st_size


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"version-\d+", path.name) is not None and path.is_dir()


def _signal(process_id: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, which)


def _wait_until_gone(process_id: int) -> None:
    """Wait until the process has terminated. It may be a zombie, because its parent is stopped."""
    path = Path(f"/proc/{process_id}/stat")
    for _ in range(500):
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    raise TimeoutError(f"process {process_id} still exists 5 s after SIGKILL")
