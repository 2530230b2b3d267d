"""Lengths by outcome of the verifier, and their correlation with it."""

import numpy as np
import pytest

from speed_async.environments.outcome_lengths import OutcomeLengths
from speed_async.types import VerifierOutcome


def lengths_of(**tokens: list[int]) -> OutcomeLengths:
    lengths = OutcomeLengths()
    outcomes: dict[str, VerifierOutcome] = {"scored": "scored", "timeout": "timeout"}
    for name, each in tokens.items():
        for num_tokens in each:
            lengths.add(outcomes[name], num_tokens)
    return lengths


def test_the_correlation_is_that_of_the_outcome_as_zero_or_one() -> None:
    scored, timeout = [3, 8, 5, 9, 4, 6], [12, 7, 30]
    lengths = lengths_of(scored=scored, timeout=timeout)
    lengths.add("error", 1000)  # does not affect time-outs
    expected = np.corrcoef([0] * 6 + [1] * 3, scored + timeout)[0, 1]
    assert lengths.length_correlation("timeout") == pytest.approx(expected)
    summary = lengths.summary()
    assert summary["timeout"] == {
        "completions": 3,
        "mean_tokens": pytest.approx(49 / 3),
        "length_correlation": pytest.approx(expected),
    }
    assert summary["scored"] == {"completions": 6, "mean_tokens": pytest.approx(35 / 6)}


def test_an_unknown_correlation_is_none() -> None:
    assert lengths_of(timeout=[3, 4]).length_correlation("timeout") is None
    assert lengths_of(scored=[3, 4]).length_correlation("timeout") is None
    assert lengths_of(scored=[4, 4], timeout=[4]).length_correlation("timeout") is None
    assert lengths_of().mean_tokens("error") is None


def test_sums_of_several_actors_add_up() -> None:
    parts = [lengths_of(scored=[1, 2], timeout=[9]), lengths_of(scored=[5], timeout=[7, 8])]
    sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    whole = lengths_of(scored=[1, 2, 5], timeout=[9, 7, 8])
    assert OutcomeLengths(sums).summary() == whole.summary()
