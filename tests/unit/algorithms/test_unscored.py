"""The estimate when the verifier cannot score some answers, by exhaustive enumeration.

The reward of an answer without a verdict is NaN. A group with such an answer is not trained.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from speed_async.algorithms.advantages import rloo
from speed_async.algorithms.screening import Choice
from speed_async.config.sections.gate import GateConfig
from tests.fakes.enumeration import Estimator, Floats, one_of, probabilities, total

WITHOUT_GATE = GateConfig(mode="off", n_init=2, n_cont=2)
PROBS = (0.3, 0.25, 0.25, 0.2)
POLICIES = one_of(rewards=(0.0, 1.0, 0.5, math.nan), probs=PROBS)
"""The last answer makes the verifier time out."""


def gradient_given_scored_D() -> Floats:
    """Gradient of E[r given a verdict] = E[r and scored] / P(scored)."""
    scored_A = ~np.isnan(POLICIES.rewards_A)
    probs_A = probabilities(POLICIES.logprobs_AT) * scored_A
    rewards_A, scores_AD = np.nan_to_num(POLICIES.rewards_A), POLICIES.scores_ATD.sum(axis=1)
    mean = probs_A @ rewards_A / probs_A.sum()
    return (probs_A * (rewards_A - mean)) @ scores_AD / probs_A.sum()


def angle(estimate_D: Floats, truth_D: Floats) -> float:
    """In degrees."""
    cosine = estimate_D @ truth_D / math.sqrt(estimate_D @ estimate_D * (truth_D @ truth_D))
    return math.degrees(math.acos(min(cosine, 1.0)))


def all_scored(rewards_N: Floats) -> bool:
    return not np.isnan(rewards_N).any()


def over_the_scored(rewards: Sequence[Floats]) -> list[Floats]:
    """RLOO over the scored completions of each group; 0 for the others."""
    advantages: list[Floats] = []
    for rewards_N in rewards:
        scored_N = ~np.isnan(rewards_N)
        advantages_N = np.zeros(len(rewards_N))
        if scored_N.sum() > 1:
            [advantages_N[scored_N]] = rloo([rewards_N[scored_N]])
        advantages.append(advantages_N)
    return advantages


@pytest.mark.parametrize(
    ("gate", "choice", "degrees"),
    [
        (WITHOUT_GATE, "all", 0.0),
        (GateConfig(n_init=3, n_cont=2), "unbiased", 3.9),
        (GateConfig(n_init=3, n_cont=2), "none", 3.9),
    ],
)
def test_failing_the_group_follows_the_reward_given_a_verdict(
    gate: GateConfig, choice: Choice, degrees: float
) -> None:
    estimate_D = total(POLICIES, Estimator(gate=gate, choice=choice, survives=all_scored))
    assert angle(estimate_D, gradient_given_scored_D()) == pytest.approx(degrees, abs=0.05)


def test_dropping_the_completion_has_the_same_direction_without_a_gate() -> None:
    estimator = Estimator(
        gate=WITHOUT_GATE,
        advantages=over_the_scored,
        keep=lambda rewards_N: np.ones(len(rewards_N), np.bool_),
    )
    estimate_D = total(POLICIES, estimator)
    assert angle(estimate_D, gradient_given_scored_D()) == pytest.approx(0.0, abs=1e-4)


def test_a_silent_zero_changes_the_direction() -> None:
    zeros = one_of(rewards=(0.0, 1.0, 0.5, 0.0), probs=PROBS)
    estimate_D = total(zeros, Estimator(gate=WITHOUT_GATE, choice="all"))
    assert angle(estimate_D, gradient_given_scored_D()) == pytest.approx(24.5, abs=0.05)
