import numpy as np
import pytest

from speed_async.algorithms.rewards import (
    completion_limit,
    overlong_buffer,
    soft_overlong_punishment,
)


def test_the_punishment_falls_over_the_buffer_and_stays_at_the_limit():
    lengths = np.array([0, 80, 81, 90, 100, 101])
    punishment = soft_overlong_punishment(lengths, max_length=100, buffer=20)
    assert punishment.tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1])


def test_the_penalty_scales_it():
    punishment = soft_overlong_punishment(
        np.array([80, 90, 100]), max_length=100, buffer=20, penalty=0.4
    )
    assert punishment.tolist() == pytest.approx([0, -0.2, -0.4])


def test_a_buffer_of_zero_is_off_even_at_the_limit():
    assert soft_overlong_punishment(np.array([100]), max_length=100, buffer=0).tolist() == [0.0]


def test_a_buffer_of_the_whole_length_punishes_from_the_first_token():
    punishment = soft_overlong_punishment(np.array([0, 1, 4]), max_length=4, buffer=4)
    assert punishment.tolist() == [0.0, -0.25, -1.0]


def test_a_completion_is_cut_at_its_own_limit_or_at_the_contexts_end():
    assert completion_limit(1000, context_length=96, num_prompt_tokens=20) == 76
    assert completion_limit(50, context_length=96, num_prompt_tokens=20) == 50
    assert completion_limit(50, context_length=96, num_prompt_tokens=60) == 36
    assert completion_limit(1000, context_length=96) == 96
    assert completion_limit(1000, context_length=None, num_prompt_tokens=20) == 1000


def test_the_share_rounds_to_tokens():
    assert overlong_buffer(1 / 6, 3072) == 512
    assert overlong_buffer(0.2, 64) == 13
    assert overlong_buffer(0.0, 64) == 0
