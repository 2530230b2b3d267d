"""A drill: a real run, faults at random instants, a deadline for each recovery, and the witness.

run ──► wait until it trains ──► [ fault ──► recovered? ──► witness, memory ] ... ──► its end
                                                                              ──► witness
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos.faults import Fault
from chaos.held_groups import held_groups
from chaos.injector import NoTarget
from chaos.results import Result, Round
from chaos.settings import Plan
from chaos.started_run import StartedRun, started
from chaos.targets import resident_bytes
from chaos.traces import read_traces
from chaos.witness import judge_ended, judge_so_far

START_DEADLINE_S = 240.0
RECOVERY_DEADLINE_S = 240.0
MORE_UPDATES = 20


@dataclass(kw_only=True)
class Drill:
    run: StartedRun
    say: Callable[[str], None]
    result: Result = field(default_factory=Result)

    def make(self, *faults: Fault) -> list[Round]:
        """Make faults one after the other, see the run recover, and let the witness look.

        Raises DrillFailed. Faults that have nothing to hit are left out.
        """
        run, watcher, hit = self.run, self.run.watcher, []
        from_version = watcher.newest_version
        began_s = time.monotonic()
        for fault in faults:
            time.sleep(fault.wait_s)
            began_s = began_s if hit else time.monotonic()
            try:
                hit.append((fault.kind, run.injector.inject(fault)))
            except NoTarget as nothing:
                self.result.skipped.append(f"{fault.kind}: {nothing}")
                self.say(f"{fault}: not made, {nothing}")
        if not hit:
            return []
        past_version = watcher.newest_version
        run.await_whole(RECOVERY_DEADLINE_S, since_s=time.monotonic(), past_version=past_version)
        recovered_s = time.monotonic() - began_s
        if findings := judge_so_far(read_traces(run.trace_folder), run.injector.lost):
            run.fail(f"after {hit}: " + "; ".join(findings))
        service = run.targets.all().get("service")
        rounds = [
            Round(
                kind=kind,
                what=what,
                recovered_s=recovered_s,
                from_version=from_version,
                to_version=watcher.newest_version,
                service_bytes=resident_bytes(service) if service else 0,
            )
            for kind, what in hit
        ]
        self.result.rounds += rounds
        for kind, what in hit:
            self.say(f"{kind}: {what}; whole after {recovered_s:.1f} s, version {past_version}")
        watcher.forget()
        return rounds

    def see_to_its_end(self) -> None:
        """Stop the run, resume it for some updates more, and let the witness decide when it has
        ended by itself. Raises DrillFailed."""
        run, result = self.run, self.result
        num_updates = run.stop() + MORE_UPDATES
        run.resume(num_updates)
        result.verdict = judge_ended(
            run.trace_folder,
            run.run_folder,
            num_updates,
            held_groups(run.run_folder),
            run.injector.lost,
        )
        result.warnings = run.watcher.warnings
        if result.verdict.findings:
            run.fail("the witness found: " + "; ".join(result.verdict.findings))


@contextmanager
def drilling(folder: Path, plan: Plan, say: Callable[[str], None] = print) -> Iterator[Drill]:
    """A run in `folder` that trains. Left, it leaves no process, mount or port behind."""
    began_s = time.monotonic()
    with started(folder, plan) as run:
        run.await_whole(START_DEADLINE_S, since_s=began_s, past_version=2)
        yield Drill(run=run, say=say)


def run_drill(folder: Path, plan: Plan, say: Callable[[str], None] = print) -> Result:
    """Make all faults of `plan` in one run, and see it to its end. Raises DrillFailed."""
    began_s = time.monotonic()
    with drilling(folder, plan, say) as drill:
        faults = [*plan.faults]
        while faults:
            chosen = [faults.pop(0)]
            while faults and faults[0].overlaps:
                chosen.append(faults.pop(0))
            drill.make(*chosen)
        drill.see_to_its_end()
    drill.result.seconds = time.monotonic() - began_s
    return drill.result


def run_drills(
    folder: Path, plan: Plan, faults_a_run: int, say: Callable[[str], None] = print
) -> list[Result]:
    """All faults of `plan`, each run seeing `faults_a_run` of them. Raises DrillFailed."""
    results: list[Result] = []
    for first in range(0, len(plan.faults), faults_a_run):
        number, ours = len(results) + 1, plan.faults[first : first + faults_a_run]
        place = folder / f"run-{number}"
        place.mkdir()
        say(f"run {number}: {len(ours)} faults")
        result = run_drill(place, replace(plan, faults=ours, seed=plan.seed + number), say)
        say(f"run {number}: kept its promises, {result.seconds:.0f} s, {result.verdict.numbers}")
        results.append(result)
        shutil.rmtree(place)
    return results
