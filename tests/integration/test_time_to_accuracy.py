"""The time-to-accuracy benchmark: crossings, intervals, selection of rates, and spreads."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.spreads import SPREADS, pass_rates, write_prompts
from benchmarks.time_to_accuracy import best_lr
from benchmarks.time_to_accuracy_report import (
    MARKER,
    Point,
    Run,
    costs,
    interval,
    median_curve,
    ratio_interval,
    table,
    write_report,
)
from speed_async.environments.jsonl import JsonlTask
from speed_async.types import Prompt
from tests.fakes.paths import MODEL


def run_of(
    *accuracies: float, arm: str = "sync-rloo", lr: float = 1e-4, seed: int = 0, pace_s: float = 2.0
) -> Run:
    """A run evaluated every 5 updates, each of which takes `pace_s` and 100 tokens."""
    points = [
        Point(updates=5 * i, wall_s=5 * i * pace_s, tokens=500 * i, accuracy=accuracy)
        for i, accuracy in enumerate(accuracies)
    ]
    return Run(spread="real", arm=arm, lr=lr, seed=seed, points=points, process_s=1.0)


def test_a_target_is_reached_at_the_first_interpolated_crossing():
    reached = run_of(0.2, 0.4, 0.3, 0.6).reach(0.35)
    assert reached is not None
    assert reached.updates == pytest.approx(3.75)  # three quarters of the way from 0.2 to 0.4
    assert reached.wall_s == pytest.approx(7.5)
    assert reached.tokens == pytest.approx(375)


def test_a_target_that_is_never_reached_has_infinite_cost():
    runs = [run_of(0.2, 0.4), run_of(0.2, 0.6)]
    assert costs(runs, 0.5, lambda p: p.updates) == [math.inf, pytest.approx(3.75)]


def test_the_interval_of_a_median_lies_within_the_seeds_and_may_be_infinite():
    even = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert even.median == 3.0
    assert 1.0 <= even.low < 3.0 < even.high <= 5.0
    failing = interval([1.0, math.inf, math.inf, math.inf, 2.0])
    assert math.isinf(failing.median)
    assert str(failing) == "not reached"
    assert math.isinf(interval([1.0, 2.0, 3.0, math.inf, math.inf]).high)


def test_the_interval_of_a_ratio_includes_both_sides():
    ratio = ratio_interval([2.0] * 5, [4.0] * 5)
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    beaten = ratio_interval([2.0] * 5, [math.inf] * 5)
    assert beaten.median == 0.0
    assert math.isinf(ratio_interval([math.inf] * 5, [math.inf] * 5).median)


def test_the_rate_is_the_smallest_within_the_tolerance_of_the_fastest():
    slow, near, fast = (
        run_of(0.2, 0.3, 0.41, 0.59, lr=5e-5),  # 0.58 after 14.7 updates
        run_of(0.2, 0.41, 0.59, lr=1e-4),  # after 9.7
        run_of(0.2, 0.5, 0.6, lr=2e-4),  # after 9
    )
    assert best_lr([slow, near, fast]) == 1e-4
    assert best_lr([slow, fast]) == 2e-4
    # If no rate reached the highest target, the next lower one decides; else the last accuracy.
    assert best_lr([run_of(0.2, 0.3, 0.45, lr=1e-4), run_of(0.2, 0.45, 0.1, lr=2e-4)]) == 2e-4
    assert best_lr([run_of(0.2, 0.3, lr=1e-4), run_of(0.2, 0.25, lr=2e-4)]) == 1e-4


def test_a_rate_counts_only_if_every_tuning_seed_reached_the_target():
    steady = [run_of(0.2, 0.4, 0.5, 0.6, lr=1e-4, seed=s) for s in (100, 101)]
    fast = run_of(0.2, 0.6, lr=2e-4, seed=100)
    collapsed = run_of(0.2, 0.01, lr=2e-4, seed=101)
    assert best_lr([*steady, fast, collapsed]) == 1e-4
    # Means over seeds are compared: 10 updates against 5 and 7.
    assert best_lr([*steady, fast, run_of(0.2, 0.5, 0.7, lr=2e-4, seed=101)]) == 2e-4


def test_a_run_is_restored_from_its_line_in_the_results_file():
    run = run_of(0.2, 0.4)
    assert Run.from_json(run.to_json()) == run


def test_the_table_compares_with_the_baseline_and_the_report_keeps_the_text(tmp_path: Path):
    runs = [run_of(0.2, 0.4, 0.6, seed=s) for s in range(3)]
    runs += [run_of(0.2, 0.4, 0.6, arm="async-speed", seed=s, pace_s=1.0) for s in range(3)]
    rows = [("sync-rloo", 1e-4), ("async-speed", 1e-4), ("absent", 1e-4)]
    lines = table(runs, rows, (0.3, 0.5, 0.58), base_lr=1e-4, outside_lr=0.0)
    assert len(lines) == 4
    assert lines[3].startswith("| async-speed | 1e-4 | 3 |")
    assert "| 0.5 (0.5 to 0.5) |" in lines[3]
    page = tmp_path / "time_to_accuracy.md"
    page.write_text(f"prose\n{MARKER}\nold table\n")
    runs += [run_of(0.2, 0.3, lr=2e-4, seed=s) for s in range(3)]
    chosen = {("real", "sync-rloo"): 2e-4, ("real", "async-speed"): 1e-4}
    write_report(runs, chosen, ["sync-rloo", "async-speed"], [], tmp_path)
    assert page.read_text().startswith("prose\n")
    assert "old table" not in page.read_text()
    assert "### Spread: real" in page.read_text()
    # The base arm's selected rate is bad: ratios use its best one in hindsight.
    assert "| async-speed | 1e-4 | 3 |" in page.read_text() and "| 0.5 (0.5" in page.read_text()
    assert "References at every learning rate" in page.read_text()
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 10_000


def test_the_median_curve_stops_at_the_first_finished_seed():
    xs, ys = median_curve([run_of(0.2, 0.4), run_of(0.2, 0.4, 0.6)], lambda p: p.updates)
    assert xs[-1] == 5
    assert ys[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "hard", "easy"), [("real", 0.45, 0.20), ("mild", 0.05, 0.05)])
def test_a_spread_has_its_nominal_shares(tmp_path: Path, name: str, hard: float, easy: float):
    path = tmp_path / "prompts.jsonl"
    shares = write_prompts(path, model_folder=MODEL, spread=SPREADS[name], num_prompts=200, seed=1)
    assert shares["under_5_percent"] == pytest.approx(hard, abs=0.01)
    assert shares["over_95_percent"] == pytest.approx(easy, abs=0.01)
    task = JsonlTask(path=str(path), match="exact", num_held_out=20, seed=0)
    assert len(task.train_prompts) == 180


def test_exact_pass_rates_match_the_difficulty_of_the_sums():
    easy, hard = (
        Prompt(prompt_id=0, text="1111+2222=", answer="33330"),  # no carry
        Prompt(prompt_id=1, text="9999+9999=", answer="89991"),  # carries everywhere
    )
    rates = pass_rates(MODEL, [easy, hard])
    assert rates[0] > 0.9
    assert rates[1] < 0.05
    assert np.isfinite(rates).all()
