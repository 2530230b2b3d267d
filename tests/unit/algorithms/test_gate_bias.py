"""The effect of screening on the gradient estimate, verified by exhaustive enumeration.

Legend: p, p_a, p_b are the pass probabilities under the learner, screening and continuation
policy; coefficients are in units of the true gradient dp/dtheta of the prompt.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from speed_async.algorithms.screening import Choice
from speed_async.config.sections.gate import GateConfig
from tests.fakes.enumeration import (
    PARTIAL_CREDIT,
    TRIAL,
    Estimator,
    Floats,
    cosine,
    expected_coefficients,
    expected_terms,
    gate_probability,
    kept_probability,
    one_of,
    pass_or_fail,
    total,
)

SIZES = [(2, 2), (3, 2), (4, 4), (8, 4)]
BANDS = [(0.0, 1.0), (0.25, 0.75), (0.0, 0.5), (0.2, 1.0)]
STALE = [(0.5, 0.5, 0.5), (0.05, 0.1, 0.02), (0.3, 0.6, 0.15), (0.9, 0.7, 0.8)]  # p, p_a, p_b
SPEED = GateConfig(n_init=8, n_cont=16)
DEFAULT = GateConfig(n_init=4, n_cont=20)

grid = pytest.mark.parametrize(
    ("size", "band", "policies"), list(itertools.product(SIZES, BANDS, STALE))
)


def gate_of(size: tuple[int, int], band: tuple[float, float]) -> GateConfig:
    return GateConfig(n_init=size[0], n_cont=size[1], low=band[0], high=band[1])


@grid
def test_none_weights_prompts_by_gate_probability(
    size: tuple[int, int], band: tuple[float, float], policies: tuple[float, float, float]
) -> None:
    p, p_a, p_b = policies
    gate = gate_of(size, band)
    screening, continuation = expected_coefficients(
        p=p, p_a=p_a, p_b=p_b, estimator=Estimator(gate=gate, choice="none")
    )
    assert screening == 0.0
    assert continuation == pytest.approx(gate_probability(gate, p_a), abs=1e-12)


@grid
def test_unbiased_weights_screening_samples_by_kept_probability(
    size: tuple[int, int], band: tuple[float, float], policies: tuple[float, float, float]
) -> None:
    p, p_a, p_b = policies
    gate = gate_of(size, band)
    screening, continuation = expected_coefficients(
        p=p, p_a=p_a, p_b=p_b, estimator=Estimator(gate=gate, choice="unbiased")
    )
    assert screening == pytest.approx(kept_probability(gate, p_a), abs=1e-12)
    assert continuation == pytest.approx(gate_probability(gate, p_a), abs=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (4, 3), (6, 4)])
def test_enumeration_of_outcomes_matches_enumeration_of_counts(size: tuple[int, int]) -> None:
    estimator = Estimator(gate=gate_of(size, (0.0, 0.6)), choice="unbiased")
    policies = pass_or_fail(p=0.3, p_a=0.5, p_b=0.2)
    screening, continuation = expected_coefficients(p=0.3, p_a=0.5, p_b=0.2, estimator=estimator)
    terms_N = expected_terms(policies, estimator)[:, 0] / 0.21  # dp/dtheta = 0.3 x 0.7
    assert terms_N[: size[0]] == pytest.approx(screening, abs=1e-12)
    assert terms_N[size[0] :] == pytest.approx(continuation, abs=1e-12)


def test_closed_forms_match_hand_computed_values() -> None:
    gate = GateConfig(n_init=3, n_cont=1)
    assert gate_probability(gate, 0.5) == pytest.approx(6 / 8)  # all but 000 and 111
    assert kept_probability(gate, 0.5) == pytest.approx(2 / 4)  # the other two must differ


@pytest.mark.parametrize(
    ("gate", "p", "gate_share", "factor", "kept_share"),
    [  # the table of docs/algorithms.md
        (SPEED, 0.01, 0.08, 12.86, 0.88),
        (SPEED, 0.05, 0.34, 2.90, 0.90),
        (SPEED, 0.2, 0.83, 1.17, 0.95),
        (SPEED, 0.5, 0.99, 1.00, 0.99),
        (SPEED, 0.95, 0.34, 2.90, 0.90),
        (DEFAULT, 0.01, 0.04, 25.16, 0.75),
        (DEFAULT, 0.05, 0.19, 5.19, 0.77),
        (DEFAULT, 0.2, 0.59, 1.54, 0.82),
        (DEFAULT, 0.5, 0.88, 1.02, 0.86),
    ],
)
def test_all_overweights_screening_samples_of_hard_and_easy_prompts(
    gate: GateConfig, p: float, gate_share: float, factor: float, kept_share: float
) -> None:
    screening, continuation = expected_coefficients(
        p=p, estimator=Estimator(gate=gate, choice="all")
    )
    assert continuation == pytest.approx(gate_probability(gate, p), abs=1e-12)
    assert continuation == pytest.approx(gate_share, abs=0.0051)
    assert screening / continuation == pytest.approx(factor, abs=0.0051)
    kept_given_admitted = kept_probability(gate, p) / gate_probability(gate, p)
    assert kept_given_admitted == pytest.approx(kept_share, abs=0.0051)


def test_kept_share_of_unbiased_at_pass_rate_one_in_twenty() -> None:
    assert kept_probability(SPEED, 0.05) == pytest.approx(1 - 0.95**7 - 0.05**7)
    assert round(kept_probability(SPEED, 0.05), 2) == 0.30
    assert round(kept_probability(SPEED, 0.05) / gate_probability(SPEED, 0.05), 2) == 0.90


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("p", [0.02, 0.2, 0.5, 0.9])
def test_all_weights_screening_samples_more_than_unbiased(
    p: float, band: tuple[float, float]
) -> None:
    estimator = Estimator(gate=gate_of((8, 4), band), choice="all")
    screening, _ = expected_coefficients(p=p, estimator=estimator)
    assert screening > kept_probability(estimator.gate, p)


def test_all_preserves_the_gradient_direction_of_a_prompt_with_binary_rewards() -> None:
    policies = one_of(
        rewards=(0.0, 0.0, 1.0, 1.0),
        probs=(0.4, 0.3, 0.2, 0.1),
        screening_probs=(0.3, 0.5, 0.05, 0.15),
        continuation_probs=(0.2, 0.3, 0.1, 0.4),
    )
    gate = GateConfig(n_init=3, n_cont=1)
    multiples_D = total(policies, Estimator(gate=gate, choice="all")) / policies.gradient_D
    assert multiples_D == pytest.approx(multiples_D[0])
    assert multiples_D[0] > 3 * kept_probability(gate, 0.2) + gate_probability(gate, 0.2)


def test_direction_of_the_joint_gradient_of_two_prompts() -> None:
    hard, moderate = 0.05, 0.5

    def degrees(weight_hard: float, weight_moderate: float) -> float:
        """Gradient direction with one logit per prompt; 0 is the axis of the moderate prompt."""
        return math.degrees(math.atan2(weight_hard * 0.0475, weight_moderate * 0.25))

    def direction(choice: Choice) -> float:
        weights = []
        for p in (hard, moderate):
            estimator = Estimator(gate=SPEED, choice=choice)
            screening, continuation = expected_coefficients(p=p, estimator=estimator)
            weights.append(8 * screening + 16 * continuation)
        return degrees(*weights)

    assert degrees(1, 1) == pytest.approx(10.76, abs=0.01)  # every prompt, no gate
    gate_only = degrees(gate_probability(SPEED, hard), gate_probability(SPEED, moderate))
    assert direction("none") == pytest.approx(gate_only) == pytest.approx(3.69, abs=0.01)
    assert direction("unbiased") == pytest.approx(3.57, abs=0.01)
    assert direction("all") == pytest.approx(6.00, abs=0.01)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_filter_with_all_is_unbiased_for_binary_rewards(
    p: float,
) -> None:
    """Rejected groups have zero gradient."""
    gate = GateConfig(mode="filter", n_init=3, n_cont=3)
    screening, _ = expected_coefficients(p=p, estimator=Estimator(gate=gate, choice="all"))
    assert screening == pytest.approx(1.0)


def test_filter_with_all_is_biased_for_partial_credit() -> None:
    """Rejected groups have a nonzero gradient."""
    gate = GateConfig(mode="filter", n_init=2, n_cont=2)
    assert cosine(PARTIAL_CREDIT, Estimator(gate=gate, choice="all")) < 0.9
    assert cosine(PARTIAL_CREDIT, Estimator(gate=gate, choice="unbiased")) == pytest.approx(1.0)


@pytest.mark.parametrize("band", BANDS)
def test_filter_with_unbiased_matches_kept_probability(
    band: tuple[float, float],
) -> None:
    gate = GateConfig(mode="filter", n_init=3, n_cont=3, low=band[0], high=band[1])
    coefficient, _ = expected_coefficients(
        p=0.3, p_a=0.45, estimator=Estimator(gate=gate, choice="unbiased")
    )
    assert coefficient == pytest.approx(kept_probability(gate, 0.45), abs=1e-12)


def test_partial_credit_is_exact_for_unbiased_and_none_and_biased_for_all() -> None:
    unbiased, none, biased = (
        Estimator(gate=TRIAL, choice="unbiased"),
        Estimator(gate=TRIAL, choice="none"),
        Estimator(gate=TRIAL, choice="all"),
    )
    # P(pass) = 0.1: P(gate admits) = 1 - 0.9^3 - 0.1^3; P(two others differ) = 2 x 0.1 x 0.9.
    truth_D = PARTIAL_CREDIT.gradient_D
    assert total(PARTIAL_CREDIT, none) == pytest.approx(2 * 0.27 * truth_D)
    assert total(PARTIAL_CREDIT, unbiased) == pytest.approx((2 * 0.27 + 3 * 0.18) * truth_D)
    assert cosine(PARTIAL_CREDIT, biased) == pytest.approx(0.758, abs=1e-3)
    assert truth_D[1] > 0 > total(PARTIAL_CREDIT, biased)[1]  # the sign of half credit is wrong


def test_partial_credit_is_exact_under_stale_policies() -> None:
    policies = one_of(
        rewards=(0.0, 0.5, 1.0),
        probs=(0.2, 0.7, 0.1),
        screening_probs=(0.5, 0.2, 0.3),
        continuation_probs=(0.3, 0.3, 0.4),
    )
    expected_D = (3 * kept_probability(TRIAL, 0.3) + 2 * gate_probability(TRIAL, 0.3)) * (
        policies.gradient_D
    )
    estimate_D = total(policies, Estimator(gate=TRIAL, choice="unbiased"))
    assert estimate_D == pytest.approx(expected_D)


def test_gate_on_mean_reward_must_test_all_possible_rewards() -> None:
    def admits(rewards: Floats) -> bool:
        return 0.2 < rewards.mean() < 0.8

    def is_unaffected(rewards_N: Floats, index: int, values: tuple[float, ...]) -> bool:
        return all(
            admits(np.r_[np.delete(rewards_N[:2], index), value]) == admits(rewards_N[:2])
            for value in values
        )

    def flipped_only(rewards_N: Floats) -> NDArray[np.bool_]:
        flips = [is_unaffected(rewards_N, i, (float(rewards_N[i] < 1),)) for i in range(2)]
        return np.array([*flips, True, True])

    def every_value(rewards_N: Floats) -> NDArray[np.bool_]:
        return np.array(
            [*(is_unaffected(rewards_N, i, (0.0, 0.5, 1.0)) for i in range(2)), True, True]
        )

    policies = one_of(rewards=(0.0, 0.5, 1.0), probs=(0.6, 0.3, 0.1))
    estimator = partial(Estimator, gate=GateConfig(n_init=2, n_cont=2), opens=admits)
    # Admitted unless both are 0 or both are 1; no single value changes that when the other is 0.5
    # (probability 0.3).
    assert total(policies, estimator(keep=every_value)) == pytest.approx(
        (2 * 0.63 + 2 * 0.30) * policies.gradient_D
    )
    assert cosine(policies, estimator(keep=flipped_only)) == pytest.approx(0.988, abs=1e-3)
