"""Results of suites in lines, panel, plot, wandb and summary."""

from pathlib import Path

from speed_async.observability.lines import suite_line
from speed_async.observability.metrics import Event, Value
from speed_async.observability.report import plot_accuracy, suite_points
from speed_async.observability.sinks import JsonlSink, read_events
from speed_async.observability.summary import summary_text
from speed_async.observability.wandb_sink import row_of
from tests.fakes.panel_states import GAUGES, shown, state_after

RESULT: dict[str, Value] = {
    "wall_s": 60.0,
    "accuracy": 0.9,
    "suite": "math500",
    "policy_version": 10,
    "mean": 0.312,
    "num_samples": 4,
    "num_passed": 624,
    "num_completions": 2000,
    "num_unscored": 0,
    "num_truncated": 12,
    "oldest_version": 10,
    "newest_version": 13,
}
SUITE = Event(kind="suite", values=RESULT)


def test_a_line_has_the_suite_its_version_and_the_range() -> None:
    assert suite_line(RESULT) == (
        "suite math500 v10 mean@4 0.312 versions 10..13 truncated 12/2000 at 1m00s"
    )


def test_the_panel_has_a_row_for_each_suite_and_keeps_the_held_out_accuracy() -> None:
    other = Event(kind="suite", values=RESULT | {"suite": "aime24", "mean": 0.1})
    state = state_after(
        Event(kind="step", values=GAUGES | {"accuracy": 0.5}),
        SUITE,
        other,
        Event(kind="suite", values=RESULT | {"mean": 0.25, "policy_version": 20}),
    )
    rows = [line for line in shown(state, 100) if "mean@4" in line and "v" in line]
    assert "math500" in rows[0] and "0.250" in rows[0] and "v20 (10..13) best 0.31" in rows[0]
    assert "aime24" in rows[1] and "0.100" in rows[1]
    assert any("held-out" in line and "0.500" in line for line in shown(state, 100))


def test_the_plot_places_a_result_where_its_version_was_trained(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for version in (10, 20):
        values: dict[str, Value] = {"wall_s": 3.0 * version, "policy_version": version}
        sink.write(Event(kind="step", values=values))
    sink.write(Event(kind="suite", values=RESULT | {"policy_version": 0, "mean": 0.2}))
    sink.write(SUITE)
    sink.close()
    points = suite_points(read_events(tmp_path / "metrics.jsonl"))
    assert points == {"math500 mean@4": [(0.0, 0.2), (30.0, 0.312)]}
    assert plot_accuracy(tmp_path).is_file()


def test_wandb_gets_a_result_below_its_suite_at_its_version() -> None:
    row = row_of(SUITE)
    assert (row["suite/math500/mean"], row["policy_version"]) == (0.312, 10)
    assert not any("accuracy" in key for key in row)


def test_the_summary_has_the_change_and_the_best_version() -> None:
    first, last, best = (
        {"policy_version": version, "mean": mean}
        for version, mean in ((0, 0.2), (40, 0.3), (20, 0.35))
    )
    suites = {
        "held_out": {"num_samples": 1, "first": first, "last": last, "best": best},
        "math500": {"num_samples": 4, "first": first, "last": last, "best": best},
        "started": {"num_samples": 1},
    }
    lines = [line for line in summary_text({"suites": suites}).splitlines() if "mean@" in line]
    assert lines == ["  math500     mean@4 20.0 % (version 0) -> 30.0 % (40), best 35.0 % (20)"]
