"""The shrunken baseline is unbiased: every outcome of an update of small groups is enumerated.

Shape legend: G groups of one update, N completions of each, D parameters.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from speed_async.algorithms.advantages import shrunken
from speed_async.algorithms.screening import Choice
from tests.fakes.enumeration import (
    PARTIAL_CREDIT,
    TRIAL,
    Estimator,
    Floats,
    gate_probability,
    kept_probability,
    total,
)


def expected_gradients(rates: tuple[float, ...], size: int, prior_weight: float) -> list[float]:
    """Expected estimate of each group, one logit per prompt, over all outcomes of the update. The
    score of outcome y is y - p."""
    sums_G = np.zeros(len(rates))
    for flat in itertools.product([0.0, 1.0], repeat=size * len(rates)):
        outcome_GN = np.array(flat).reshape(len(rates), size)
        rates_G1 = np.array(rates)[:, None]
        probability = float(np.where(outcome_GN == 1, rates_G1, 1 - rates_G1).prod())
        advantages = shrunken(list(outcome_GN), prior_weight=prior_weight)
        sums_G += probability * (np.stack(advantages) * (outcome_GN - rates_G1)).sum(axis=1)
    return sums_G.tolist()


@pytest.mark.parametrize("prior_weight", [0.5, 2.0, 9.0])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_group_has_the_gradient_of_its_prompt(size: int, prior_weight: float) -> None:
    rates = (0.05, 0.5, 0.8)
    expected = [size * p * (1 - p) for p in rates]
    assert expected_gradients(rates, size, prior_weight) == pytest.approx(expected, abs=1e-12)


def with_another_group(rewards_of_one: Sequence[Floats], other: Floats) -> list[Floats]:
    """The advantages of one group beside another one with fixed rewards."""
    return shrunken([*rewards_of_one, other], prior_weight=2.0)[:1]


@pytest.mark.parametrize("other", [[0.0, 0.0], [1.0, 0.5, 1.0]])
@pytest.mark.parametrize(
    ("choice", "weight"),
    [
        ("none", 2 * gate_probability(TRIAL, 0.1)),
        ("unbiased", 2 * gate_probability(TRIAL, 0.1) + 3 * kept_probability(TRIAL, 0.1)),
    ],
)
def test_screening_and_partial_credit_change_nothing(
    choice: Choice, weight: float, other: list[float]
) -> None:
    advantages = partial(with_another_group, other=np.array(other))
    estimate_D = total(PARTIAL_CREDIT, Estimator(gate=TRIAL, choice=choice, advantages=advantages))
    assert estimate_D == pytest.approx(weight * PARTIAL_CREDIT.gradient_D)


def test_the_shrunken_baseline_lowers_the_variance_of_small_groups() -> None:
    """Two prompts at 0.4 and 0.6: the variance of the coefficient of one group of two, given
    another group at the mean, with scores of equal length."""

    def variance(prior_weight: float) -> float:
        sums = np.zeros(2)
        for p, outcome in itertools.product((0.4, 0.6), itertools.product([0.0, 1.0], repeat=2)):
            rewards_N, other_N = np.array(outcome), np.array([0.0, 1.0])
            probability = math.prod(p if y else 1 - p for y in outcome) / 2
            advantages = shrunken([rewards_N, other_N], prior_weight=prior_weight)[0]
            estimate = float(advantages @ (rewards_N - p))
            sums += probability * np.array([estimate, estimate**2])
        return float(sums[1] - sums[0] ** 2)

    assert variance(2.0) < variance(1e-9)
