"""Pacing of generation to training, in runs on a simulated clock."""

import random
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.types import GroupEnd
from tests.fakes.simulated_run import Outcome, SimulatedRun, execute

NUM_UPDATES = 100
PASS_RATES = [rate / 100 for rate in range(0, 100, 5)] * 20


def long_tailed(rng: random.Random) -> int:
    """Mean 20; one completion of 100 is longer than 90."""
    return max(1, round(rng.lognormvariate(2.7, 0.8)))


def constant(rng: random.Random) -> int:
    return 6


def config(folder: Path, slots: int, **sections: dict[str, object]) -> Config:
    (folder / "config.json").write_text("{}")
    tree: dict[str, dict[str, object]] = {
        "model": {"path": str(folder), "context_length": 1 << 20},
        "task": {"name": "arithmetic"},
        "gate": {"n_init": 4, "n_cont": 4},
        "learner": {"groups_per_update": 8},
        "actors": {"slots": slots, "max_new_tokens": 4096},
        "evaluate": {"every": 0},
        "run": {"updates": 1000},
        "cluster": {"peer_timeout_s": 1e9, "stall_timeout_s": 1e9},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return build_config({"algorithm": "speed-rloo"} | tree)


def stale_share(run: SimulatedRun) -> float:
    ledger = run.service.lifecycle.ledger
    return ledger.ends[GroupEnd.STALE].tokens / ledger.tokens_generated


def distance(outcome: Outcome) -> float:
    """Kolmogorov-Smirnov distance between the lengths that were generated and trained."""
    one, other = np.sort(outcome.lengths_generated), np.sort(outcome.lengths_trained)
    at = np.concatenate([one, other])
    shares = [np.searchsorted(each, at, "right") / len(each) for each in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def simulate(
    config: Config, *, tail: bool, train_s: float, sync_s: float = 1.0
) -> tuple[SimulatedRun, Outcome]:
    length = long_tailed if tail else constant
    run = SimulatedRun(config, length=length, pass_rates=PASS_RATES, train_s=train_s, sync_s=sync_s)
    return run, execute(run, NUM_UPDATES)


def test_trained_completions_are_as_long_as_generated_ones(tmp_path: Path) -> None:
    run, outcome = simulate(config(tmp_path, 64), tail=True, train_s=20)
    assert stale_share(run) < 0.01
    assert distance(outcome) < 0.02
    mean = fmean(outcome.lengths_trained) / fmean(outcome.lengths_generated)
    assert mean == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("is_diagnosed", [True, False])
def test_long_waits_for_late_groups_are_diagnosed_with_the_remedy(
    tmp_path: Path, is_diagnosed: bool
) -> None:
    run, outcome = simulate(config(tmp_path, 512), tail=is_diagnosed, train_s=4)
    diagnosis = str(run.service.present_status(outcome.end_s).values["diagnoses"])
    assert diagnosis.startswith("updates wait for long completions: in ") == is_diagnosed
    assert ("raise buffer.max_staleness (now 2)" in diagnosis) == is_diagnosed


def test_an_update_does_not_wait_for_the_groups_of_a_hung_engine(tmp_path: Path) -> None:
    two = config(
        tmp_path, 32, cluster={"actors": 2, "peer_timeout_s": 1e9, "stall_timeout_s": 1e9},
        weights={"deadline_s": 100.0},
    )  # fmt: skip
    run = SimulatedRun(two, length=long_tailed, pass_rates=PASS_RATES, train_s=20, sync_s=1.0)
    run.hangs = {"actor-2.0": 20}
    longest_s = max(np.diff(execute(run, 26).trained_s))
    assert 100 < longest_s < 300, "the leases of the hung engine stay open"


def test_dropping_late_groups_trains_shorter_completions(tmp_path: Path) -> None:
    dropping = config(tmp_path, 64, buffer={"late_groups": "drop"})
    run, outcome = simulate(dropping, tail=True, train_s=20)
    assert stale_share(run) > 0.05
    assert fmean(outcome.lengths_trained) < 0.95 * fmean(outcome.lengths_generated)


@pytest.mark.parametrize("mode", ["screen", "off"])
@pytest.mark.parametrize("train_s", [4, 20, 60])
def test_hardly_any_group_becomes_stale_whichever_side_is_faster(
    tmp_path: Path, train_s: float, mode: str
) -> None:
    choices: dict[str, dict[str, object]] = {
        "gate": {"n_init": 4, "n_cont": 4, "mode": mode},
        "objective": {"screening_samples": "all"},
    }
    run, outcome = simulate(config(tmp_path, 64, **choices), tail=False, train_s=train_s)
    assert stale_share(run) < 0.01
    if train_s == 60:  # a batch is always there at the next step of the clock
        assert outcome.waited_s <= NUM_UPDATES


def test_no_group_becomes_stale_while_a_slow_broadcast_delays_new_versions(tmp_path: Path) -> None:
    ungated = config(tmp_path, 64, gate={"mode": "off", "n_init": 4, "n_cont": 4})
    run, _ = simulate(ungated, tail=False, train_s=20, sync_s=20)
    assert stale_share(run) == 0
