"""The gate acceptance, the discounted counts of each prompt, and the shared prior."""

from itertools import product

import numpy as np
import pytest

from speed_async.buffer.curriculum.beliefs import (
    Beliefs,
    BeliefsState,
    GateAcceptance,
    PriorState,
    SharedPrior,
)
from speed_async.config.sections.gate import GateConfig
from tests.fakes.buffer_fixtures import screened

GATE = GateConfig()


def test_gate_acceptance_is_the_binomial_sum_over_the_strict_band() -> None:
    theta = np.array([0.0, 0.1, 0.5, 1.0])
    # 1 - theta^4 - (1 - theta)^4: at 0.1 1 - 0.0001 - 0.6561, at 0.5 1 - 2/16.
    assert GateAcceptance(GATE)(theta) == pytest.approx([0, 0.3438, 0.875, 0])
    # Only 2 of 4 is strictly between 1/4 and 3/4: 6 theta^2 (1 - theta)^2.
    narrow_gate = GateAcceptance(GateConfig(low=0.25, high=0.75))
    assert narrow_gate(theta) == pytest.approx([0, 6 * 0.01 * 0.81, 6 / 16, 0])
    # In filter mode the gate applies to the whole group of 24.
    filtered = GateAcceptance(GateConfig(mode="filter"))
    assert filtered(theta) == pytest.approx([0, 1 - 0.9**24 - 0.1**24, 1 - 2 * 0.5**24, 0])


def test_an_outcome_counts_half_after_a_half_life_and_a_quarter_after_two() -> None:
    beliefs = Beliefs(2, GATE, 10.0, BeliefsState.new(2))
    beliefs.add(1, 4, 24)
    beliefs.advance(10)
    alpha, beta = beliefs.posterior(np.array([0, 1]))
    assert (alpha[1] - alpha[0], beta[1] - beta[0]) == (2.0, 10.0)
    beliefs.add(1, 3, 4)
    beliefs.advance(20)
    alpha, beta = beliefs.posterior(np.array([0, 1]))
    # Passes (4 / 2 + 3) / 2, fails (20 / 2 + 1) / 2; prompt 0 was never seen and has the prior.
    assert (alpha[1] - alpha[0], beta[1] - beta[0]) == (2.5, 5.5)
    assert (alpha[0], beta[0]) == beliefs.prior.parameters


def test_without_data_the_posterior_returns_to_the_prior_and_the_prior_to_its_start() -> None:
    beliefs = Beliefs(1, GATE, 2.0, BeliefsState.new(1))
    for _ in range(100):
        beliefs.prior.add(0, 4)
    beliefs.add(0, 0, 4)
    assert beliefs.prior.parameters[0] < 0.1
    beliefs.advance(80)
    alpha, beta = beliefs.posterior(np.array([0]))
    assert (alpha[0], beta[0]) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_the_prior_starts_as_beta_1_1_and_follows_the_moments() -> None:
    prior = SharedPrior(GATE, 1e9, PriorState())
    assert prior.parameters == pytest.approx((1.0, 1.0))
    for _ in range(12):
        prior.add(2, 4)
    # m1 = (4 + 12/2) / 20 = 1/2, m2 = (8/3 + 12/6) / 20 = 7/30: s = (8/30) / (-1/60) < 0, which
    # is clipped to the strongest prior.
    assert prior.parameters == pytest.approx((25.0, 25.0))


def test_the_prior_recovers_a_beta_from_groups_of_gated_length() -> None:
    rng = np.random.default_rng(0)
    prior = SharedPrior(GATE, 1e9, PriorState())
    for theta in rng.beta(0.5, 1.5, 20_000):
        prior.add(*screened(theta, rng))
    a, b = prior.parameters
    assert (a, b) == pytest.approx((0.5, 1.5), rel=0.05)


def test_the_screening_part_is_inferred_without_bias_from_the_whole_group() -> None:
    # 2 + 1 completions; each outcome of all 3 is enumerated at theta = 0.3.
    gate, theta = GateConfig(n_init=2, n_cont=1), 0.3
    expected = np.zeros(3)
    refused, accepted = (SharedPrior(gate, 1e9, PriorState()) for _ in range(2))
    for outcome in product((0, 1), repeat=3):
        weight = theta ** sum(outcome) * (1 - theta) ** (3 - sum(outcome))
        prior = SharedPrior(gate, 1e9, PriorState())
        before = prior.sums.copy()
        passed = sum(outcome[:2])
        prior.add(*((sum(outcome), 3) if passed == 1 else (passed, 2)))
        expected += weight * (prior.sums - before)
    assert expected == pytest.approx([1.0, theta, theta**2])
    # By hand: 1 of 3 in an accepted group is 1 of 2 before the continuation, and so is 2 of 3.
    refused.add(2, 2)
    accepted.add(2, 3)
    assert refused.sums - SharedPrior(gate, 1e9, PriorState()).sums == pytest.approx([1, 1, 1])
    assert accepted.sums - SharedPrior(gate, 1e9, PriorState()).sums == pytest.approx([1, 0.5, 0])
