import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_async.learner.advantages import rloo


def test_one_success_among_three_is_worth_one_and_each_failure_minus_a_half():
    assert rloo([1.0, 0.0, 0.0]).tolist() == [1.0, -0.5, -0.5]


def test_two_successes_among_four():
    np.testing.assert_allclose(rloo([1, 1, 0, 0]), [2 / 3, 2 / 3, -2 / 3, -2 / 3], rtol=1e-15)


def test_fractional_rewards():
    # 0.2 - mean(0.5, 0.8), 0.5 - mean(0.2, 0.8), 0.8 - mean(0.2, 0.5)
    np.testing.assert_allclose(rloo([0.2, 0.5, 0.8]), [-0.45, 0.0, 0.45], atol=1e-15)


def test_equal_rewards_give_exact_zeros_even_where_their_sum_rounds():
    assert not rloo([0.1] * 24).any()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 completions in a group, got 1"):
        rloo([1.0])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_it_is_the_centred_reward_stretched_by_n_over_n_minus_1(rewards: list[float]):
    centred = np.array(rewards) - np.mean(rewards)
    np.testing.assert_allclose(
        rloo(rewards), centred * len(rewards) / (len(rewards) - 1), atol=1e-12
    )
