import numpy as np
import pytest

from speed_async.algorithms.rewards import (
    completion_limit,
    overlong_buffer,
    soft_overlong_punishment,
)


def test_the_penalty_is_linear_within_the_buffer():
    lengths = np.array([0, 80, 81, 90, 100, 101])
    punishment = soft_overlong_punishment(lengths, max_length=100, buffer=20)
    assert punishment.tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1])


def test_the_penalty_factor_scales_the_penalty():
    punishment = soft_overlong_punishment(
        np.array([80, 90, 100]), max_length=100, buffer=20, penalty=0.4
    )
    assert punishment.tolist() == pytest.approx([0, -0.2, -0.4])


def test_a_buffer_of_zero_disables_the_penalty():
    assert soft_overlong_punishment(np.array([100]), max_length=100, buffer=0).tolist() == [0.0]


def test_a_buffer_of_the_full_length_applies_from_the_first_token():
    punishment = soft_overlong_punishment(np.array([0, 1, 4]), max_length=4, buffer=4)
    assert punishment.tolist() == [0.0, -0.25, -1.0]


def test_the_completion_limit_respects_the_context_length():
    assert completion_limit(1000, context_length=96, num_prompt_tokens=20) == 76
    assert completion_limit(50, context_length=96, num_prompt_tokens=20) == 50
    assert completion_limit(50, context_length=96, num_prompt_tokens=60) == 36
    assert completion_limit(1000, context_length=96) == 96
    assert completion_limit(1000, context_length=None, num_prompt_tokens=20) == 1000


def test_the_overlong_buffer_is_rounded():
    assert overlong_buffer(1 / 6, 3072) == 512
    assert overlong_buffer(0.2, 64) == 13
    assert overlong_buffer(0.0, 64) == 0
