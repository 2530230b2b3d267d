import numpy as np
import pytest

from speed_async.algorithms.aggregation import (
    fixed_length,
    prompt_mean,
    sequence_mean,
    token_mean,
)

# Two prompts: completions of 2 and 6 tokens, and of 3, 0 and 1.
LENGTHS = [np.array([2, 6]), np.array([3, 0, 1])]


def test_token_mean_gives_every_token_of_the_update_the_same_share():
    assert [w.tolist() for w in token_mean(LENGTHS)] == [[1 / 12] * 2, [1 / 12] * 3]


def test_sequence_mean_gives_every_completion_the_same_share_an_empty_one_too():
    first, second = sequence_mean(LENGTHS)
    assert first.tolist() == pytest.approx([1 / 10, 1 / 30])
    assert second[[0, 2]].tolist() == pytest.approx([1 / 15, 1 / 5])
    # four of five completions have tokens
    assert (first * LENGTHS[0]).sum() + (second * LENGTHS[1]).sum() == pytest.approx(4 / 5)


def test_prompt_mean_gives_every_prompt_the_same_share():
    first, second = prompt_mean(LENGTHS)
    assert first.tolist() == pytest.approx([1 / 16] * 2)
    assert second.tolist() == pytest.approx([1 / 8] * 3)
    assert (first * LENGTHS[0]).sum() == (second * LENGTHS[1]).sum() == pytest.approx(1 / 2)


def test_fixed_length_divides_by_what_no_outcome_moves():
    assert [w.tolist() for w in fixed_length(LENGTHS, max_new_tokens=8)] == [
        [1 / 40] * 2,
        [1 / 40] * 3,
    ]


def test_an_update_without_any_token_has_finite_weights():
    empty = [np.array([0, 0])]
    for aggregation in (token_mean, sequence_mean, prompt_mean):
        assert np.isfinite(aggregation(empty)[0]).all()
