"""One fault of each kind that a run survives without a restart, and which processes it affects.

There are two real runs. Each fault is injected in turn, and the unaffected processes are checked.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.drill import Drill, drilling
from tests.faults.faults import Fault
from tests.faults.settings import Plan


def inject(drill: Drill, kind: str, share: float = 0.3) -> float:
    """Inject a fault and return the seconds until the run has recovered."""
    [result] = drill.inject(Fault(kind=kind, wait_s=0.0, share=share))
    return result.recovered_s


def replaced(drill: Drill, before: dict[str, int]) -> set[str]:
    """Names of the processes that have been replaced."""
    now = drill.run.targets.all()
    return {name for name in before if now.get(name) != before[name]}


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    with drilling(tmp_path, Plan(faults=[], seed=1)) as drill:
        yield drill


def test_faults_of_links_disk_and_service_restart_no_other_process(
    drill: Drill,
) -> None:
    before = drill.run.targets.all()
    for kind in ("cut links", "refuse links", "stall links", "delay links", "fill disk"):
        assert inject(drill, kind) < 20.0, kind
        assert replaced(drill, before) == set(), kind
    warning = "the journal cannot be written (No space left on device): the run waits for space"
    assert warning in drill.run.watcher.warnings or drill.run.injector.limits_files
    for kind in ("stop service", "hang service"):
        assert inject(drill, kind) < 20.0
        assert replaced(drill, before) == set(), kind
    assert inject(drill, "kill service") < 20.0
    assert replaced(drill, before) == {"service"}
    drill.finish()
    numbers = drill.result.verdict.numbers
    assert numbers["actor_incarnations"] == 2 + 2  # two of them after the resume
    assert numbers["updates_rolled_back"] == 0


def test_a_truncated_journal_and_a_damaged_checkpoint_are_reported_and_recovered(
    drill: Drill,
) -> None:
    inject(drill, "truncate journal", 0.9)
    assert any("the journal's tail was damaged" in text for text in drill.run.watcher.warnings)
    drill.run.await_recovery(60.0, since_s=0.0, past_version=25)  # several checkpoints
    inject(drill, "damage checkpoint")
    stderr = (drill.run.run_folder.parents[1] / "stderr.txt").read_text()
    assert "is damaged (" in stderr
    assert "; resuming from version-0000" in stderr
    drill.finish()
    assert drill.result.skipped == []
