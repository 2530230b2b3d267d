"""One fault of each kind that a run survives without being started anew, and what it costs whom.

Two real runs; each fault is made in turn, and what must not have noticed it is looked at.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.drill import Drill, drilling
from chaos.faults import Fault
from chaos.settings import Plan


def make(drill: Drill, kind: str, share: float = 0.3) -> float:
    """Seconds until the run was whole again."""
    [made] = drill.make(Fault(kind=kind, wait_s=0.0, share=share))
    return made.recovered_s


def replaced(drill: Drill, before: dict[str, int]) -> set[str]:
    """Names of those who are not the processes they were."""
    now = drill.run.targets.all()
    return {name for name in before if now.get(name) != before[name]}


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    with drilling(tmp_path, Plan(faults=[], seed=1)) as drill:
        yield drill


def test_what_befalls_links_disk_and_service_makes_the_others_wait_and_nothing_else(
    drill: Drill,
) -> None:
    before = drill.run.targets.all()
    for kind in ("cut links", "refuse links", "stall links", "delay links", "fill disk"):
        assert make(drill, kind) < 20.0, kind
        assert replaced(drill, before) == set(), kind
    warned = "the journal cannot be written (No space left on device): the run waits for space"
    assert warned in drill.run.watcher.warnings or drill.run.injector.limits_files
    for kind in ("stop service", "hang service"):
        assert make(drill, kind) < 20.0
        assert replaced(drill, before) == set(), kind
    assert make(drill, "kill service") < 20.0
    assert replaced(drill, before) == {"service"}
    drill.see_to_its_end()
    assert drill.result.verdict.numbers["actor_lives"] == 2 + 2  # two of them after the resume
    assert drill.result.verdict.numbers["updates_taken_back"] == 0


def test_a_cut_journal_and_a_damaged_checkpoint_are_said_and_gone_on_from_what_is_whole(
    drill: Drill,
) -> None:
    make(drill, "truncate journal", 0.9)
    assert any("the journal's tail was damaged" in text for text in drill.run.watcher.warnings)
    drill.run.await_whole(60.0, since_s=0.0, past_version=25)  # several checkpoints
    make(drill, "damage checkpoint")
    said = (drill.run.run_folder.parents[1] / "stderr.txt").read_text()
    assert "is damaged (" in said
    assert "; going on from version-0000" in said
    drill.see_to_its_end()
    assert drill.result.skipped == []
