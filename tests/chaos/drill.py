"""A drill: a real run, faults at random instants, a deadline for each recovery, and the witness.

run ──► wait until it trains ──► [ fault ──► recovered? ──► witness, memory ] ... ──► its end
                                                                              ──► witness
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from chaos.disk import small_disk
from chaos.faults import Fault
from chaos.injector import Injector, NoTarget
from chaos.proxy import Proxy
from chaos.results import Result, Round
from chaos.settings import DISK_BYTES, PEER_TIMEOUT_S, Plan, write_config
from chaos.targets import MARK, Targets, resident_bytes
from chaos.traces import read_traces
from chaos.watcher import Watcher
from chaos.witness import judge_ended, judge_so_far
from speed_async.observe.metrics import Event

START_DEADLINE_S = 90.0
RECOVERY_DEADLINE_S = 90.0
END_DEADLINE_S = 300.0


class DrillFailed(AssertionError):
    """The run did not keep its promises; the text says which, and where to look."""


def run_drill(folder: Path, plan: Plan, say: Callable[[str], None] = print) -> Result:
    """Make all faults of `plan` in one run in `folder`, and see it to its last update.

    Raises DrillFailed. Nothing is left behind: processes, mounts and ports are free again.
    """
    began_s = time.monotonic()
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk", DISK_BYTES))
        drill = stack.enter_context(_started(folder, disk.folder / "run", plan))
        injector = Injector(
            targets=drill.targets,
            proxy=drill.proxy,
            disk=disk,
            run_folder=drill.run_folder,
            num_actors=plan.num_actors,
            peer_timeout_s=PEER_TIMEOUT_S,
        )
        result = Result()
        drill.await_whole(START_DEADLINE_S, since_s=began_s, past_version=2)
        faults = [*plan.faults]
        while faults and not drill.is_over():
            drill.one_round(injector, faults, result, say)
        result.left = faults
        drill.await_end()
        result.verdict = judge_ended(
            drill.trace_folder, drill.run_folder, plan.updates, injector.lost
        )
        result.warnings = drill.watcher.warnings
        result.seconds = time.monotonic() - began_s
        if result.verdict.findings:
            drill.fail("the witness found: " + "; ".join(result.verdict.findings))
    return result


@dataclass(kw_only=True)
class _Drill:
    """A started run with everything around it."""

    process: subprocess.Popen[str]
    targets: Targets
    proxy: Proxy
    watcher: Watcher
    run_folder: Path
    trace_folder: Path
    num_actors: int

    def one_round(
        self, injector: Injector, faults: list[Fault], result: Result, say: Callable[[str], None]
    ) -> None:
        """The next fault, and those that overlap it; then recovery, and the witness' first look."""
        chosen = [faults.pop(0)]
        while faults and faults[0].overlaps:
            chosen.append(faults.pop(0))
        from_version, hit = self.watcher.newest_version, []
        began_s = time.monotonic()
        for fault in chosen:
            time.sleep(fault.wait_s)
            began_s = time.monotonic() if not hit else began_s
            try:
                hit.append((fault.kind, injector.inject(fault)))
            except NoTarget as nothing:
                result.skipped.append(f"{fault.kind}: {nothing}")
                say(f"{fault}: not made, {nothing}")
        if not hit:
            return
        past_version = max(from_version, self.watcher.newest_version)
        healed_s = time.monotonic()
        self.await_whole(RECOVERY_DEADLINE_S, since_s=healed_s, past_version=past_version)
        recovered_s = time.monotonic() - began_s
        if findings := judge_so_far(read_traces(self.trace_folder)):
            self.fail(f"after {hit}: " + "; ".join(findings))
        service = self.targets.all().get("service")
        for kind, what in hit:
            result.rounds.append(
                Round(
                    kind=kind,
                    what=what,
                    recovered_s=recovered_s,
                    from_version=from_version,
                    to_version=self.watcher.newest_version,
                    service_bytes=resident_bytes(service) if service else 0,
                )
            )
            say(f"{kind}: {what}; whole again after {recovered_s:.1f} s, version {past_version}")
        self.watcher.forget()

    def await_whole(self, timeout_s: float, *, since_s: float, past_version: int) -> None:
        """Until the feed says that all actors work, the ledger closes, and a new version is there;
        or until the run has ended well."""
        wanted = {"service", "learner"}
        for index in range(1, self.num_actors + 1):
            wanted |= {f"actor-{index}", f"engine-{index}", f"supervisor-{index}"}

        def is_whole(event: Event) -> bool:
            values = event.values
            return (
                values.get("policy_version", 0) > past_version
                and values.get("actors_alive") == self.num_actors
                and values.get("ledger_closes") is True
            )

        ends_s = time.monotonic() + timeout_s
        while not self.watcher.wait(is_whole, since_s, 0.25) or wanted - set(self.targets.all()):
            if self.is_over():
                return
            if time.monotonic() > ends_s:
                latest = self.watcher.latest()
                there = sorted(self.targets.all())
                self.fail(f"not whole within {timeout_s:.0f} s: {there}, {latest}")

    def is_over(self) -> bool:
        """Whether the run has ended. Raises DrillFailed when it did not end well."""
        status = self.process.poll()
        if status:
            self.fail(f"the run ended with status {status}")
        return status == 0

    def await_end(self) -> None:
        try:
            self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.fail(
                f"no end within {END_DEADLINE_S:.0f} s; the latest is {self.watcher.latest()}"
            )
        self.is_over()
        _wait_for(lambda: not self.targets.commands(), 10.0)
        if left := self.targets.commands():
            self.fail(f"processes outlive the run: {left}")

    def fail(self, why: str) -> None:
        words = [f"{path.name}: {_tail(path)}" for path in self._logs()]
        raise DrillFailed("\n".join([why, f"warnings: {self.watcher.warnings[-10:]}", *words]))

    def _logs(self) -> list[Path]:
        return sorted([*self.run_folder.parents[1].glob("*.txt"), *self.run_folder.glob("logs/*")])


@contextmanager
def _started(folder: Path, run_folder: Path, plan: Plan) -> Iterator[_Drill]:
    """The run, its proxy and its watcher; whatever happens, no process is left in the end."""
    service_port, feed_port = _free_ports(2)
    trace_folder, config = folder / "trace", folder / "config.toml"
    trace_folder.mkdir()
    targets = Targets(mark=str(folder))
    with Proxy(service_port) as proxy, Watcher(feed_port) as watcher:
        write_config(
            config,
            plan,
            run_folder=run_folder,
            trace_folder=trace_folder,
            service_port=service_port,
            advertised_port=proxy.port,
            feed_port=feed_port,
        )
        with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "speed_async", "train", str(config)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: targets.mark},
            )
        try:
            yield _Drill(
                process=process,
                targets=targets,
                proxy=proxy,
                watcher=watcher,
                run_folder=run_folder,
                trace_folder=trace_folder,
                num_actors=plan.num_actors,
            )
        finally:
            process.kill()
            process.wait()
            targets.end_all()


def _free_ports(count: int) -> list[int]:
    """Free a moment ago; nothing but a drill's own processes takes them on purpose."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_for(happened: Callable[[], bool], timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    while not happened() and time.monotonic() < ends_s:
        time.sleep(0.05)


def _tail(path: Path, num_lines: int = 12) -> str:
    return "\n  ".join(path.read_text(errors="replace").splitlines()[-num_lines:])


def run_drills(
    folder: Path, plan: Plan, faults_a_run: int, say: Callable[[str], None] = print
) -> list[Result]:
    """All faults of `plan`, in as many runs as they take: each sees at most `faults_a_run` of
    them, and the rest of its own where it ended sooner. Raises DrillFailed."""
    results: list[Result] = []
    faults = [*plan.faults]
    while faults:
        number = len(results) + 1
        ours, faults = faults[:faults_a_run], faults[faults_a_run:]
        place = folder / f"run-{number}"
        place.mkdir()
        say(f"run {number}: {len(ours)} faults, {plan.updates} updates")
        result = run_drill(place, replace(plan, faults=ours, seed=plan.seed + number), say)
        say(f"run {number}: kept its promises, {result.seconds:.0f} s, {result.verdict.numbers}")
        faults = result.left + faults
        results.append(result)
        shutil.rmtree(place)
    return results
