"""A fault-injection drill: a real run, faults at random times, a deadline per recovery, and checks.

run ──► wait until it trains ──► [ fault ──► recovered? ──► checks, memory ] ... ──► end ──► checks
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.faults import Fault
from tests.faults.held_groups import held_groups
from tests.faults.injector import NoTarget
from tests.faults.results import Result, Round
from tests.faults.run_checker import check_finished, check_running
from tests.faults.settings import Plan
from tests.faults.started_run import StartedRun, start_run
from tests.faults.targets import private_bytes
from tests.faults.traces import read_traces

START_DEADLINE_S = 240.0
RECOVERY_DEADLINE_S = 240.0
MORE_UPDATES = 20


@dataclass(kw_only=True)
class Drill:
    run: StartedRun
    log: Callable[[str], None]
    result: Result = field(default_factory=Result)

    def inject(self, *faults: Fault) -> list[Round]:
        """Inject faults one after the other, wait for the recovery, and check the invariants.

        Raises DrillFailed. Faults without a target are skipped.
        """
        run, watcher, injected = self.run, self.run.watcher, []
        from_version = watcher.newest_version
        start_s = time.monotonic()
        for fault in faults:
            time.sleep(fault.wait_s)
            start_s = start_s if injected else time.monotonic()
            try:
                injected.append((fault.kind, run.injector.inject(fault)))
            except NoTarget as error:
                self.result.skipped.append(f"{fault.kind}: {error}")
                self.log(f"{fault}: not injected, {error}")
        if not injected:
            return []
        past_version = watcher.newest_version
        run.await_recovery(RECOVERY_DEADLINE_S, since_s=time.monotonic(), past_version=past_version)
        recovered_s = time.monotonic() - start_s
        if findings := check_running(read_traces(run.trace_folder), run.injector.lost):
            run.fail(f"after {injected}: " + "; ".join(findings))
        service = run.targets.all().get("service")
        rounds = [
            Round(
                kind=kind,
                what=what,
                recovered_s=recovered_s,
                from_version=from_version,
                to_version=watcher.newest_version,
                service_bytes=private_bytes(service) if service else 0,
            )
            for kind, what in injected
        ]
        self.result.rounds += rounds
        for kind, what in injected:
            self.log(f"{kind}: {what}; recovered after {recovered_s:.1f} s, version {past_version}")
        watcher.clear_events()
        return rounds

    def inject_all(self, faults: Sequence[Fault]) -> None:
        """Inject each fault together with those that overlap it."""
        left = [*faults]
        while left:
            chosen = [left.pop(0)]
            while left and left[0].overlaps:
                chosen.append(left.pop(0))
            self.inject(*chosen)

    def finish(self) -> None:
        """Stop the run, resume it for more updates, and check it after it has finished. Raises
        DrillFailed."""
        run, result = self.run, self.result
        num_updates = run.stop() + MORE_UPDATES
        run.resume(num_updates)
        result.verdict = check_finished(
            run.trace_folder,
            run.run_folder,
            num_updates,
            held_groups(run.run_folder),
            run.injector.lost,
        )
        result.warnings = run.watcher.warnings
        if result.verdict.findings:
            run.fail("violated invariants: " + "; ".join(result.verdict.findings))


@contextmanager
def drilling(folder: Path, plan: Plan, log: Callable[[str], None] = print) -> Iterator[Drill]:
    """A training run in `folder`. On exit, no process, mount or port is left behind."""
    start_s = time.monotonic()
    with start_run(folder, plan) as run:
        run.await_recovery(START_DEADLINE_S, since_s=start_s, past_version=2)
        yield Drill(run=run, log=log)


def run_drill(folder: Path, plan: Plan, log: Callable[[str], None] = print) -> Result:
    """Inject all faults of `plan` into one run, and finish it. Raises DrillFailed."""
    start_s = time.monotonic()
    with drilling(folder, plan, log) as drill:
        drill.inject_all(plan.faults)
        drill.finish()
    drill.result.seconds = time.monotonic() - start_s
    return drill.result


def run_drills(
    folder: Path, plan: Plan, faults_a_run: int, log: Callable[[str], None] = print
) -> list[Result]:
    """Inject all faults of `plan`, `faults_a_run` of them per run. Raises DrillFailed."""
    results: list[Result] = []
    for first in range(0, len(plan.faults), faults_a_run):
        number, run_faults = len(results) + 1, plan.faults[first : first + faults_a_run]
        run_folder = folder / f"run-{number}"
        run_folder.mkdir()
        log(f"run {number}: {len(run_faults)} faults")
        run_plan = replace(plan, faults=run_faults, seed=plan.seed + number)
        result = run_drill(run_folder, run_plan, log)
        log(f"run {number}: all invariants hold, {result.seconds:.0f} s, {result.verdict.numbers}")
        results.append(result)
        shutil.rmtree(run_folder)
    return results
