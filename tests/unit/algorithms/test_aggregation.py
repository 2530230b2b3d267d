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


def test_token_mean_weighs_all_tokens_equally():
    assert [w.tolist() for w in token_mean(LENGTHS)] == [[1 / 12] * 2, [1 / 12] * 3]


def test_sequence_mean_weighs_all_completions_equally():
    first, second = sequence_mean(LENGTHS)
    assert first.tolist() == pytest.approx([1 / 10, 1 / 30])
    assert second[[0, 2]].tolist() == pytest.approx([1 / 15, 1 / 5])
    # four of five completions have tokens
    assert (first * LENGTHS[0]).sum() + (second * LENGTHS[1]).sum() == pytest.approx(4 / 5)


def test_prompt_mean_weighs_all_prompts_equally():
    first, second = prompt_mean(LENGTHS)
    assert first.tolist() == pytest.approx([1 / 16] * 2)
    assert second.tolist() == pytest.approx([1 / 8] * 3)
    assert (first * LENGTHS[0]).sum() == (second * LENGTHS[1]).sum() == pytest.approx(1 / 2)


def test_fixed_length_is_independent_of_the_lengths():
    assert [w.tolist() for w in fixed_length(LENGTHS, max_new_tokens=8)] == [
        [1 / 40] * 2,
        [1 / 40] * 3,
    ]


def test_weights_are_finite_without_tokens():
    empty = [np.array([0, 0])]
    for aggregation in (token_mean, sequence_mean, prompt_mean):
        assert np.isfinite(aggregation(empty)[0]).all()
