"""One fault of each kind in one real run, and which processes it affects.

Faults that restart nothing come first, then damaged files, then lost and hanging processes at
random times, some of them before the run has recovered from the previous one.
"""

from pathlib import Path

from tests.faults.drill import Drill, drilling
from tests.faults.faults import KINDS, Fault, plan
from tests.faults.results import GROWTH, service_growth
from tests.faults.settings import GROUPS_PER_UPDATE, Plan
from tests.faults.traces import read_traces

SEED = 1640
RECOVERS_IN_S = 25.0
"""Long for a busy machine, and shorter than a handshake of ZeroMQ that nobody gives up (30 s)."""
WITHOUT_RESTARTS = ("cut links", "refuse links", "stall links", "delay links", "fill disk")
STOPPED_SERVICE = ("stop service", "hang service")
KILLED_SERVICE = "kill service"
DAMAGED_FILES = ("truncate journal", "damage checkpoint")
LOST_PROCESSES = [
    kind
    for kind in KINDS
    if kind not in (*WITHOUT_RESTARTS, *STOPPED_SERVICE, KILLED_SERVICE, *DAMAGED_FILES)
]


def inject(drill: Drill, kind: str, share: float = 0.3) -> float:
    """Inject a fault and return the seconds until the run has recovered."""
    [result] = drill.inject(Fault(kind=kind, wait_s=0.0, share=share))
    return result.recovered_s


def replaced(drill: Drill, before: dict[str, int]) -> set[str]:
    """Names of the processes that have been replaced."""
    now = drill.run.targets.all()
    return {name for name in before if now.get(name) != before[name]}


def test_each_kind_of_fault_loses_no_group_trains_none_twice_and_the_run_finishes(
    tmp_path: Path,
) -> None:
    with drilling(tmp_path, Plan(faults=[], seed=1, num_actors=1)) as drill:
        check_that_no_other_process_restarts(drill)
        check_that_damaged_files_are_reported(drill)
        assert drill.result.skipped == []
        drill.inject_all(plan(SEED, len(LOST_PROCESSES), LOST_PROCESSES, overlapping=0.75))
        drill.finish()
    result = drill.result
    assert {each.kind for each in result.rounds} == set(KINDS)
    assert result.skipped == []
    numbers = result.verdict.numbers
    assert numbers["groups_trained"] == numbers["updates"] * GROUPS_PER_UPDATE
    assert service_growth(result.rounds) < GROWTH


def check_that_no_other_process_restarts(drill: Drill) -> None:
    before = drill.run.targets.all()
    for kind in WITHOUT_RESTARTS:
        assert inject(drill, kind) < RECOVERS_IN_S, kind
        assert replaced(drill, before) == set(), kind
    check_that_a_full_disk_is_reported(drill)
    for kind in STOPPED_SERVICE:
        assert inject(drill, kind) < RECOVERS_IN_S
        assert replaced(drill, before) == set(), kind
    assert inject(drill, KILLED_SERVICE) < RECOVERS_IN_S
    assert replaced(drill, before) == {"service"}
    traces = read_traces(drill.run.trace_folder)
    assert len(traces.actors) == drill.run.plan.num_actors
    assert len(traces.updates) == len(traces.lineage())  # none was rolled back


def check_that_a_full_disk_is_reported(drill: Drill) -> None:
    warning = "the journal cannot be written (No space left on device): the run waits for space"

    def is_reported() -> bool:
        given = [line for text in drill.run.watcher.warnings for line in text.splitlines()]
        return warning in given or drill.run.injector.limits_files

    for _ in range(20):  # a busy machine may write nothing to the journal while the disk is full
        if is_reported():
            break
        inject(drill, "fill disk", 1.0)
    assert is_reported()


def check_that_damaged_files_are_reported(drill: Drill) -> None:
    truncate, damage = DAMAGED_FILES
    inject(drill, truncate, 0.9)
    assert any("the journal's tail was damaged" in text for text in drill.run.watcher.warnings)
    # Every tenth version is written in the background, and the third waits for the second.
    drill.run.await_recovery(60.0, since_s=0.0, past_version=30)
    inject(drill, damage)
    stderr = (drill.run.run_folder.parents[1] / "stderr.txt").read_text()
    assert "is damaged (" in stderr
    assert "; resuming from version-0000" in stderr
