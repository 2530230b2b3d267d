"""What a run had spent at each version: lines that arrive late or in parts, and the origin."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence.watch import RunWatch


def line(kind: str, version: int, wall_s: float, tokens: int) -> str:
    values = {"kind": kind, "policy_version": version, "wall_s": wall_s}
    return json.dumps(values | {"tokens_generated": tokens + 6, "tokens_evaluation": 6}) + "\n"


def test_versions_have_the_cost_at_their_own_time_not_at_that_of_reading(tmp_path: Path):
    """The clock of the run is 100 s behind; one core is used throughout; generation begins at 2 s,
    with 1000 tokens per second."""
    path = tmp_path / "metrics.jsonl"
    now_s = 100.0
    watch = RunWatch(path, 6000, lambda: now_s)
    watch.poll(0.0)  # the file does not exist yet
    with path.open("w") as file:
        for until_s, text in (
            (104.0, line("evaluation", 0, 4.0, 2000)),
            (105.5, line("step", 1, 5.0, 3000) + line("step", 2, 5.5, 3500)[:20]),
            (106.0, line("step", 2, 5.5, 3500)[20:]),
            (109.0, line("step", 3, 8.0, 6000) + line("step", 4, 8.5, 6500)),
        ):
            now_s = until_s
            file.write(text)
            file.flush()
            watch.poll(now_s - 100)
    versions = watch.versions(every=2)
    assert [(each.version, each.tokens) for each in versions] == [(2, 3500), (4, 6500)]
    assert [each.wall_s for each in versions] == pytest.approx([3.5, 6.5])
    assert [each.core_s for each in versions] == pytest.approx([3.5, 6.5])


def test_a_run_is_stopped_once_when_it_reaches_the_horizon(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    watch = RunWatch(path, 6000)
    path.write_text(line("evaluation", 0, 1.0, 0) + line("step", 1, 2.0, 5999))
    watch.poll(0.0)
    assert not watch.should_stop()
    with path.open("a") as file:
        file.write(line("step", 2, 3.0, 6000))
    watch.poll(0.0)
    assert watch.should_stop()
    assert watch.stopped
    assert not watch.should_stop()
