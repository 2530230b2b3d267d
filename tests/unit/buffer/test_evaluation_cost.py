"""What evaluations cost a run, on a simulated clock."""

import random
from pathlib import Path

import pytest

from speed_async.config.load import build_config
from speed_async.config.sections.evaluate import HELD_OUT
from tests.fakes.buffer_fixtures import make_suite
from tests.fakes.simulated_run import Outcome, SimulatedRun, execute

NUM_UPDATES = 60
PASS_RATES = [rate / 100 for rate in range(0, 100, 5)] * 100
MAX_DELAY = 0.05
SIZES = {HELD_OUT: 256, "amc": 250}


def training_length(rng: random.Random) -> int:
    return 20


def evaluation_length(rng: random.Random) -> int:
    """Mean 20; one completion of 100 is longer than 90."""
    return max(1, round(rng.lognormvariate(2.7, 0.8)))


def simulate(folder: Path, *, train_s: float, evaluating: bool) -> tuple[SimulatedRun, Outcome]:
    """With the defaults, except that the held-out prompts are evaluated every 10 updates, with a
    suite every 20: they would need 8 % of the tokens of training. Or with neither."""
    suite = make_suite(folder, "amc", every=20 if evaluating else 0)
    (folder / "config.json").write_text("{}")
    config = build_config(
        {
            "algorithm": "speed-rloo",
            "model": {"path": str(folder), "context_length": 1 << 20},
            "task": {"name": "arithmetic"},
            "actors": {"max_new_tokens": 4096},
            "evaluate": {"every": 10 if evaluating else 0, "suites": [suite]},
            "cluster": {"peer_timeout_s": 1e9, "stall_timeout_s": 1e9},
        }
    )
    run = SimulatedRun(
        config,
        length=training_length,
        evaluation_length=evaluation_length,
        pass_rates=PASS_RATES,
        train_s=train_s,
        num_held_out=SIZES[HELD_OUT],
        suite_sizes={"amc": SIZES["amc"]},
    )
    return run, execute(run, NUM_UPDATES)


@pytest.mark.parametrize("train_s", [10, 250], ids=["actor-bound", "learner-bound"])
def test_evaluations_delay_training_by_less_than_five_percent(
    tmp_path: Path, train_s: float
) -> None:
    _, without = simulate(tmp_path, train_s=train_s, evaluating=False)
    run, outcome = simulate(tmp_path, train_s=train_s, evaluating=True)
    delay_s = outcome.training_s - without.training_s
    assert delay_s <= MAX_DELAY * without.training_s
    # Where roles share cores, every token takes time from the others.
    evaluation_tokens = outcome.evaluation_tokens[-1] - outcome.evaluation_tokens[0]
    assert evaluation_tokens <= MAX_DELAY * outcome.training_tokens[-1]
    # Evaluations use what they may, and end.
    assert evaluation_tokens >= 0.02 * outcome.training_tokens[-1]
    versions = [plan.evaluated_version or 0 for plan in run.service.components.evaluations.plans]
    assert min(versions) > 0
