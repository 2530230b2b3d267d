"""Several learner ranks train as one: same parameters, same metrics, same verdicts.

Four ranks count as two nodes, so parameters are replicated across them.
"""

from pathlib import Path

import torch
from pytest import approx

from speed_async.learner.model import load_model
from speed_async.learner.parallel.ranks import ONE_RANK
from tests.fakes.learner_ranks import (
    HALF,
    OVERFLOWING_UPDATE,
    SCENARIOS,
    found,
    run_ranks,
    run_scenario,
    save_models,
)


def test_two_and_three_ranks_train_as_one_and_resume_what_more_ranks_saved(tmp_path: Path) -> None:
    save_models(tmp_path)
    rows = tmp_path / "rows-experts"
    rows.mkdir()
    run_ranks(tmp_path, 3, ["dense", "experts", "overflow"])
    check_trained_as_one(tmp_path, 3, ["dense", "experts", "overflow"])
    saved = [*rows.glob("*-of-00003.tensors")]
    assert len(saved) == 2 * 3

    run_ranks(tmp_path, 2, ["experts/resumed", *SCENARIOS, HALF])
    check_trained_as_one(tmp_path, 2, [*SCENARIOS])
    check_half(tmp_path)
    for path in saved:
        path.unlink()
    _, resumed_by_one = run_scenario(tmp_path, "experts", ONE_RANK, resumes=True)

    _, start = found(tmp_path, 3, 0, "experts")
    _, resumed_by_two = found(tmp_path, 2, 0, "experts/resumed")
    _, expected = run_scenario(tmp_path, "experts", ONE_RANK, rounds=2)
    for resumed in (resumed_by_one, resumed_by_two):
        for name, tensor in expected.items():
            torch.testing.assert_close(resumed[name], tensor, atol=2e-5, rtol=0, msg=name)
            assert not torch.equal(resumed[name], start[name]), name


def test_ranks_of_two_nodes_train_as_one_and_two_ranks_resume(tmp_path: Path) -> None:
    save_models(tmp_path)
    (tmp_path / "rows-experts").mkdir()
    run_ranks(tmp_path, 4, ["dense", "experts"])
    check_trained_as_one(tmp_path, 4, ["dense", "experts"])
    run_ranks(tmp_path, 2, ["experts/resumed"])
    check_resumed(tmp_path, 2)


def test_ranks_of_two_nodes_resume_what_one_rank_saved(tmp_path: Path) -> None:
    save_models(tmp_path)
    run_scenario(tmp_path, "experts", ONE_RANK, saves=True)
    run_ranks(tmp_path, 4, ["experts/resumed"])
    check_resumed(tmp_path, 4)


def test_two_ranks_that_resume_continue_exactly(tmp_path: Path) -> None:
    """Bit by bit as two ranks that were not interrupted."""
    save_models(tmp_path)
    names = ["experts", "scored", "adapters"]
    for name in names:
        (tmp_path / f"rows-{name}").mkdir()
    run_ranks(tmp_path, 2, names)
    run_ranks(tmp_path, 2, [f"{name}/{kind}" for name in names for kind in ("resumed", "twice")])
    for name in names:
        for rank in range(2):
            results, weights = found(tmp_path, 2, rank, f"{name}/resumed")
            expected_results, expected = found(tmp_path, 2, rank, f"{name}/twice")
            for result in (*results, *expected_results):
                del result["metrics"]["optimizer_updates"]  # counted from the start of a process
            assert results == expected_results[len(results) :]
            for key, tensor in expected.items():
                assert torch.equal(weights[key], tensor), (name, rank, key)


def check_resumed(folder: Path, size: int) -> None:
    _, resumed = found(folder, size, 0, "experts/resumed")
    _, start = run_scenario(folder, "experts", ONE_RANK)
    _, expected = run_scenario(folder, "experts", ONE_RANK, rounds=2)
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-5, rtol=0, msg=name)
        assert not torch.equal(resumed[name], start[name]), name


def check_half(folder: Path) -> None:
    """bfloat16 rounds differently with another division of the rows: the changes are similar."""
    _, expected = run_scenario(folder, HALF, ONE_RANK)
    start = dict(load_model(folder / HALF, device="cpu").named_parameters())
    one, other = (found(folder, 2, rank, HALF) for rank in range(2))
    assert one[0] == other[0]
    num_adapted = 0
    for name, tensor in expected.items():
        assert torch.equal(one[1][name], other[1][name])
        assert one[1][name].dtype == tensor.dtype
        if tensor.dtype == torch.float32:  # merged
            num_adapted += 1
            ours, theirs = (each - start[name].detach() for each in (tensor, one[1][name]))
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9, name
    assert num_adapted == 2 * 7


def check_trained_as_one(folder: Path, size: int, scenarios: list[str]) -> None:
    for name in scenarios:
        results, weights = run_scenario(folder, name, ONE_RANK)
        first = found(folder, size, 0, name)
        for rank in range(size):
            theirs, their_weights = found(folder, size, rank, name)
            assert theirs == first[0], (name, rank)
            assert their_weights.keys() == weights.keys()
            for key, tensor in weights.items():
                torch.testing.assert_close(
                    their_weights[key], tensor, atol=1e-5, rtol=0, msg=f"{name} {key}"
                )
        for theirs, ours in zip(first[0], results, strict=True):
            assert theirs["metrics"] == approx(ours["metrics"], rel=1e-3, abs=1e-5), name
            assert theirs["canary"] == approx(ours["canary"], abs=1e-4)
            rest = {"metrics": 0, "canary": 0}
            assert theirs | rest == ours | rest
        skipped = [result["num_skipped"] for result in results]
        assert skipped == [int(name == "overflow" and i == OVERFLOWING_UPDATE) for i in range(5)]
