"""The estimate when truncated completions are out of the gradient, by exhaustive enumeration.

The reward of a truncated answer is marked as NaN here; it counts as 0 in the baselines.
"""

import math

import numpy as np
import pytest

from speed_async.algorithms.advantages import rloo
from speed_async.config.sections.gate import GateConfig
from tests.fakes.enumeration import Estimator, Floats, one_of, probabilities, total

N = 3
PROBS = (0.3, 0.2, 0.2, 0.3)
POLICIES = one_of(rewards=(0.0, 1.0, 0.5, math.nan), probs=PROBS)
FILTERED = Estimator(
    gate=GateConfig(mode="off", n_init=1, n_cont=N - 1),
    advantages=lambda rewards: rloo([np.nan_to_num(rewards_N) for rewards_N in rewards]),
    keep=lambda rewards_N: ~np.isnan(rewards_N),
)


def gradient_D(values_A: Floats) -> Floats:
    """Gradient of the mean of these values of the answers."""
    return (probabilities(POLICIES.logprobs_AT) * values_A) @ POLICIES.scores_ATD.sum(axis=1)


def test_the_estimate_is_that_of_finished_answers_with_a_bonus_for_finishing() -> None:
    """P(S) grad J_S + (1 - P(S)) J_S grad P(S), with S the event that the answer is finished and
    J_S the mean reward of finished answers."""
    finished_A, rewards_A = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.5, 0.0])
    share = 0.7
    mean = (0.2 * 1.0 + 0.2 * 0.5) / share
    of_finished_D = gradient_D(rewards_A) - mean * gradient_D(finished_A)  # P(S) grad J_S
    expected_D = of_finished_D + (1 - share) * mean * gradient_D(finished_A)
    assert total(POLICIES, FILTERED) == pytest.approx(N * expected_D, abs=1e-12)


def test_an_unfiltered_estimate_also_punishes_truncation() -> None:
    """Without the filter, the bonus for finishing is J_S instead of (1 - P(S)) J_S."""
    plain = one_of(rewards=(0.0, 1.0, 0.5, 0.0), probs=PROBS)
    unfiltered = Estimator(gate=FILTERED.gate, choice="all")
    difference_D = total(plain, unfiltered) - total(POLICIES, FILTERED)
    assert difference_D == pytest.approx(N * 0.3 * gradient_D(np.array([1.0, 1.0, 1.0, 0.0])))
