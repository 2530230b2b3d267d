"""Does what a fault's kind says to a run, and undoes what has an end."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from chaos.disk import LimitedFiles, SmallDisk
from chaos.faults import Fault
from chaos.lost_records import LostRecords
from chaos.proxy import Proxy
from chaos.targets import Targets
from speed_async.buffer.durability.journal import read_segment

TARGET_DEADLINE_S = 60.0
"""A victim that is just being started again is waited for this long."""
NEWEST_RECORDS_BYTES = 4096
"""Most that is cut from a journal's tail."""


class NoTarget(Exception):
    """What the fault needs is not there (no checkpoint yet): it is not made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injector:
    targets: Targets
    proxy: Proxy
    disk: SmallDisk | LimitedFiles
    run_folder: Path
    num_actors: int
    peer_timeout_s: float
    lost: LostRecords = field(default_factory=LostRecords)
    """What was cut from the journal, for the witness."""

    @property
    def limits_files(self) -> bool:
        """No disk of its own could be mounted here: files are kept from growing instead."""
        return isinstance(self.disk, LimitedFiles)

    def inject(self, fault: Fault) -> str:
        """Make the fault and, where it has an end, wait for that; says what was hit.

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
        raise ValueError(f"no such kind of fault: '{fault.kind}'")

    # --- processes -------------------------------------------------------------------------

    def _pick(self, what: str, share: float) -> str:
        """Name of the victim; of several alike the one that `share` falls on."""
        if what in ("service", "learner"):
            return what
        return f"{what}-{1 + int(share * 1e6) % self.num_actors}"

    def _process(self, name: str) -> int:
        ends_s = time.monotonic() + TARGET_DEADLINE_S
        while (process_id := self.targets.all().get(name)) is None:
            if time.monotonic() > ends_s:
                raise NoTarget(f"no {name} for {TARGET_DEADLINE_S:.0f} s")
            time.sleep(0.05)
        return process_id

    def _kill(self, name: str) -> str:
        _signal(self._process(name), signal.SIGKILL)
        return name

    def _kill_all(self) -> str:
        """Every process at once, but for the launcher, which is to start them again."""
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
        """Cut at once, or for a while: refused past the peer timeout, delayed, or stalled."""
        acts: dict[str, tuple[Callable[[], None], float]] = {
            "cut": (self.proxy.cut, 0.0),
            "refuse": (self.proxy.refuse, 0.3 + share * self.peer_timeout_s),
            "delay": (lambda: self.proxy.delay(0.02 + 0.3 * share), 2.0),
            "stall": (self.proxy.stall, 0.3 + share * 2 * self.peer_timeout_s),
        }
        act, lasting_s = acts[verb]
        act()
        try:
            time.sleep(lasting_s)
        finally:
            self.proxy.restore()
        return f"{self.proxy.num_accepted} connections so far, {lasting_s:.1f} s"

    # --- files -----------------------------------------------------------------------------

    def _fill(self, lasting_s: float) -> str:
        writers = [self._process("service")]  # the others' traces lie elsewhere, and must go on
        self.disk.fill(writers)
        try:
            time.sleep(lasting_s)
        finally:
            self.disk.free(writers)
        return f"{type(self.disk).__name__} for {lasting_s:.1f} s"

    def _truncate(self, share: float) -> str:
        """Kill the service and cut its journal while whoever would start it again is held."""
        service = self._process("service")  # there before its learner is held: that one starts it
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
        """Change one byte of a file of the newest checkpoint, and kill the learner."""
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
            victim = random.Random(share).choice(files)
            with victim.open("r+b") as file:
                file.seek(int(share * victim.stat().st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 0xFF]))
            _signal(learner, signal.SIGKILL)
        return f"{newest.name}/{victim.name}"

    def _newest(self, folder: Path, wanted: Callable[[Path], bool]) -> Path:
        found = [path for path in folder.glob("*") if wanted(path)] if folder.is_dir() else []
        if not found:
            raise NoTarget(f"nothing in {folder}")
        return max(found, key=lambda path: path.name)


def _end_of_records(segment: Path) -> int:
    """Behind it a killed service may have left padding, of which to cut some would harm nobody."""
    ends = [record.end for _, record in read_segment(segment.parent, int(segment.stem))]
    return ends[-1] if ends else segment.stat().st_size


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"version-\d+", path.name) is not None and path.is_dir()


def _signal(process_id: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, which)


def _wait_until_gone(process_id: int) -> None:
    """Until the process has ended: it may be a zombie, for its parent may be stopped."""
    path = Path(f"/proc/{process_id}/stat")
    for _ in range(500):
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    raise TimeoutError(f"process {process_id} is still there 5 s after SIGKILL")
