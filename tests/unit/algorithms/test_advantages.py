import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_async.algorithms.advantages import Advantages, batch, dr_grpo, grpo, rloo, shrunken


def of_one_group(advantages: Advantages, rewards: Sequence[float]) -> np.ndarray:
    (result,) = advantages([np.array(rewards, dtype=np.float64)])
    return result


def test_rloo_with_one_success_in_three():
    assert of_one_group(rloo, [1.0, 0.0, 0.0]).tolist() == [1.0, -0.5, -0.5]


def test_rloo_with_two_successes_in_four():
    np.testing.assert_allclose(
        of_one_group(rloo, [1, 1, 0, 0]), [2 / 3, 2 / 3, -2 / 3, -2 / 3], rtol=1e-15
    )


def test_rloo_with_fractional_rewards():
    # 0.2 - mean(0.5, 0.8), 0.5 - mean(0.2, 0.8), 0.8 - mean(0.2, 0.5)
    np.testing.assert_allclose(of_one_group(rloo, [0.2, 0.5, 0.8]), [-0.45, 0.0, 0.45], atol=1e-15)


def test_shrunken_baseline_counts_the_other_groups_as_completions():
    # First group: others 3 of 4, m = 2: b = (2 x 3/4 + 1) / 3 without a pass of its own, else 1/2.
    # Second group: others 1 of 2, so b = (2 x 1/2 + own passes among the other three) / 5.
    first, second = shrunken(
        [np.array([1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])], prior_weight=2.0
    )
    np.testing.assert_allclose(first, [1 - 1.5 / 3, -2.5 / 3], rtol=1e-15)
    np.testing.assert_allclose(second, [1 - 3 / 5, 1 - 3 / 5, 1 - 3 / 5, -4 / 5], rtol=1e-15)


def test_shrunken_group_of_one_has_the_mean_of_the_other_groups_as_baseline():
    one, _, _ = shrunken([np.array([1.0]), np.array([0.0]), np.array([0.5])], prior_weight=7.0)
    assert one.tolist() == [0.75]


def test_shrunken_is_zero_for_equal_rewards_and_rloo_without_prior():
    groups = [np.full(3, 0.1), np.full(2, 0.1)]
    assert [a.tolist() for a in shrunken(groups, prior_weight=2.0)] == [[0.0] * 3, [0.0] * 2]
    groups = [np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0])]
    for ours, theirs in zip(shrunken(groups, prior_weight=1e-12), rloo(groups), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-11)
    with pytest.raises(ValueError, match="at least 2 groups"):
        shrunken(groups[:1], prior_weight=2.0)


def test_grpo_divides_by_the_sample_standard_deviation():
    # mean 0.5, deviation sqrt(4 * 0.25 / 3)
    value = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(
        of_one_group(grpo, [1, 0, 1, 0]), [value, -value, value, -value], rtol=1e-12
    )


def test_dr_grpo_only_subtracts_the_mean():
    assert of_one_group(dr_grpo, [1, 0, 0, 0]).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_advantages_use_only_the_own_group():
    groups = [np.array([1.0, 0.0]), np.array([0.0, 0.0, 0.0]), np.array([4.0, 0.0, 2.0, 2.0])]
    assert [a.tolist() for a in dr_grpo(groups)] == [
        [0.5, -0.5],
        [0.0, 0.0, 0.0],
        [2.0, -2.0, 0.0, 0.0],
    ]
    assert rloo(groups)[0].tolist() == [1.0, -1.0]


def test_batch_normalises_over_all_groups():
    # rewards 1 1 0 1: mean 0.75, deviation sqrt((3 * 1/16 + 9/16) / 3) = 0.5
    first, second = batch([np.array([1.0, 1.0, 0.0]), np.array([1.0])])
    np.testing.assert_allclose(first, [0.25 / 0.5001, 0.25 / 0.5001, -0.75 / 0.5001], rtol=1e-12)
    np.testing.assert_allclose(second, [0.25 / 0.5001], rtol=1e-12)


def test_batch_is_exactly_zero_for_equal_rewards():
    assert [a.tolist() for a in batch([np.full(3, 0.1), np.full(2, 0.1)])] == [[0.0] * 3, [0.0] * 2]


@pytest.mark.parametrize("advantages", [rloo, grpo, dr_grpo])
def test_equal_rewards_give_exact_zeros_despite_rounding(advantages: Advantages):
    assert not of_one_group(advantages, [0.1] * 24).any()


@pytest.mark.parametrize("advantages", [rloo, grpo, dr_grpo])
def test_a_group_of_one_completion_raises(advantages: Advantages):
    with pytest.raises(ValueError, match="at least 2 completions in a group, got 1"):
        of_one_group(advantages, [1.0])


def test_an_update_of_one_completion_raises():
    with pytest.raises(ValueError, match="at least 2 completions to compare"):
        of_one_group(batch, [1.0])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_rloo_is_the_centred_reward_scaled_by_n_over_n_minus_1(rewards: list[float]):
    np.testing.assert_allclose(
        of_one_group(rloo, rewards),
        of_one_group(dr_grpo, rewards) * len(rewards) / (len(rewards) - 1),
        atol=1e-12,
    )
