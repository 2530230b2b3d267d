"""Several learner ranks train as one: same parameters, same metrics, same verdicts.

Four ranks count as two nodes, so parameters are replicated across them.
"""

from pathlib import Path

import pytest
import torch

from speed_async.learner.ranks import ONE_RANK
from tests.fakes.learner_ranks import (
    OVERFLOWING_UPDATE,
    SCENARIOS,
    found,
    run_ranks,
    run_scenario,
    save_models,
)


@pytest.mark.parametrize(
    ("size", "scenarios"),
    [(2, [*SCENARIOS]), (3, ["dense", "experts", "overflow"]), (4, ["dense", "experts"])],
)
def test_ranks_train_as_a_single_one_does(tmp_path: Path, size: int, scenarios: list[str]) -> None:
    save_models(tmp_path)
    run_ranks(tmp_path, size, scenarios)
    for name in scenarios:
        results, weights = run_scenario(tmp_path, name, ONE_RANK)
        first = found(tmp_path, size, 0, name)
        for rank in range(size):
            theirs, their_weights = found(tmp_path, size, rank, name)
            assert theirs == first[0], (name, rank)
            assert their_weights.keys() == weights.keys()
            for key, tensor in weights.items():
                torch.testing.assert_close(
                    their_weights[key], tensor, atol=1e-5, rtol=0, msg=f"{name} {key}"
                )
        for theirs, ours in zip(first[0], results, strict=True):
            assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-3, abs=1e-5), name
            assert theirs["canary"] == pytest.approx(ours["canary"], abs=1e-4)
            rest = {"metrics": 0, "canary": 0}
            assert theirs | rest == ours | rest
        skipped = [result["num_skipped"] for result in results]
        assert skipped == [int(name == "overflow" and i == OVERFLOWING_UPDATE) for i in range(5)]


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1)])
def test_training_state_of_some_ranks_is_resumed_by_fewer(
    tmp_path: Path, before: int, after: int
) -> None:
    save_models(tmp_path)
    (tmp_path / "rows-experts").mkdir()
    run_ranks(tmp_path, before, ["experts"])
    assert len([*(tmp_path / "rows-experts").glob(f"*-of-{before:05d}.tensors")]) == 2 * before
    run_ranks(tmp_path, after, ["experts/resumed"])

    _, expected = run_scenario(tmp_path, "experts", ONE_RANK, rounds=2)
    _, start = found(tmp_path, before, 0, "experts")
    _, resumed = found(tmp_path, after, 0, "experts")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-5, rtol=0, msg=name)
        assert not torch.equal(resumed[name], start[name]), name
