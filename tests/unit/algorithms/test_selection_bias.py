"""Biases other than the gate's: selection of finished groups, divisors, and truncated ratios."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from speed_async.algorithms.advantages import grpo, rloo
from speed_async.algorithms.corrections import geometric_tis, sequence_tis, token_tis
from speed_async.algorithms.screening import kept
from speed_async.buffer.priority import BufferedGroup, PriorityBuffer
from speed_async.config.sections.gate import GateConfig
from tests.fakes.buffer_fixtures import make_group
from tests.fakes.enumeration import (
    PARTIAL_CREDIT,
    TRIAL,
    Estimator,
    Floats,
    Policies,
    binomial,
    cosine,
    expected_coefficients,
    one_of,
    probabilities,
    total,
    two_tokens,
)


def test_masking_cannot_correct_dropping_finished_groups_by_their_own_pass_rate() -> None:
    def mixed(rewards_N: Floats) -> bool:
        return 0.3 < (rewards_N >= 1).mean() < 0.7

    estimator = partial(Estimator, gate=TRIAL, choice="none")
    assert cosine(PARTIAL_CREDIT, estimator()) == pytest.approx(1.0)
    assert cosine(PARTIAL_CREDIT, estimator(survives=mixed)) == pytest.approx(0.660, abs=1e-3)


def test_eviction_from_the_real_buffer_changes_the_weight_of_a_sample() -> None:
    def evicted_by_rival(rewards_N: Floats, rival_passes: int) -> bool:
        buffer = PriorityBuffer(capacity_groups=1, capacity_bytes=10**9)
        lost: list[BufferedGroup] = []
        for lease_id, pass_rate in ((2, rival_passes / 4), (1, float(rewards_N.mean()))):
            group = BufferedGroup(
                message=make_group(lease_id, 0),
                lease_id=lease_id,
                pass_rate=pass_rate,
                oldest_version=0,
                mean_version=0.0,
                num_tokens=12,
                num_bytes=100,
            )
            lost += buffer.insert(group)
        return [group.lease_id for group in lost] == [1]

    open_gate = GateConfig(mode="off", n_init=2, n_cont=2)
    p, coefficient, survival = 0.1, 0.0, 0.0
    for rival_passes in range(5):
        rival = binomial(4, rival_passes, 0.4)

        def survives(rewards_N: Floats, rival_passes: int = rival_passes) -> bool:
            return not evicted_by_rival(rewards_N, rival_passes)

        estimator = Estimator(gate=open_gate, choice="all", survives=survives)
        coefficient += rival * expected_coefficients(p=p, estimator=estimator)[1]
        survival += rival * sum(
            binomial(4, k, p) for k in range(5) if survives(np.repeat([1.0, 0.0], [k, 4 - k]))
        )
    assert coefficient / survival == pytest.approx(2.09, abs=0.01)


def test_dividing_a_group_by_its_own_kept_samples_reintroduces_the_bias() -> None:
    gate = GateConfig(n_init=4, n_cont=1)

    def divided(rewards: Sequence[Floats]) -> list[Floats]:
        num_kept = kept(rewards[0] >= 1, 4, gate, "unbiased").sum()
        return [rloo(rewards)[0] / num_kept]

    exact = Estimator(gate=gate, choice="unbiased")
    assert cosine(PARTIAL_CREDIT, exact) == pytest.approx(1.0)
    by_kept = Estimator(gate=gate, choice="unbiased", advantages=divided)
    assert cosine(PARTIAL_CREDIT, by_kept) == pytest.approx(0.9984, abs=1e-4)


def test_capping_the_ratio_at_two_removes_half_of_a_gradient() -> None:
    gate = GateConfig(mode="off", n_init=1, n_cont=2)
    _, coefficient = expected_coefficients(
        p=0.5,
        p_a=0.1,
        p_b=0.1,
        estimator=Estimator(gate=gate, correction=partial(token_tis, max_ratio=2.0)),
    )
    # A pass weighs 2 instead of 5, a failure its full 5/9; the others pass with 0.1:
    assert coefficient == pytest.approx(0.4 * (1 - 0.1) + 1.0 * 0.1)


def test_token_level_ratios_are_not_exact_for_longer_answers_even_without_a_cap() -> None:
    policies = two_tokens(
        rewards=(0.0, 1.0, 1.0, 0.0),
        learner=np.array([0.5, 0.3, 0.6]),
        behaviour=np.array([0.2, 0.5, 0.3]),
    )
    assert probabilities(policies.continuation_logprobs_AT) == pytest.approx([0.4, 0.4, 0.14, 0.06])
    estimator = partial(Estimator, gate=GateConfig(mode="off", n_init=1, n_cont=1))
    by_sequence = estimator(correction=partial(sequence_tis, max_ratio=1e6))
    by_token = estimator(correction=partial(token_tis, max_ratio=1e6))
    by_mean = estimator(correction=partial(geometric_tis, max_ratio=1e6))
    assert total(policies, by_sequence) == pytest.approx(2 * policies.gradient_D)
    assert cosine(policies, by_token) == pytest.approx(0.840, abs=1e-3)
    assert cosine(policies, by_mean) == pytest.approx(0.931, abs=1e-3)


def test_grpo_weights_prompts_by_difficulty_without_any_gate() -> None:
    gate = GateConfig(mode="off", n_init=4, n_cont=4)
    hard, moderate = (
        expected_coefficients(p=p, estimator=Estimator(gate=gate, advantages=grpo))[1]
        for p in (0.05, 0.5)
    )
    assert hard / moderate == pytest.approx(1.33, abs=0.01)


def test_grpo_with_unbiased_screening_samples_is_exact_for_binary_rewards_only() -> None:
    binary = one_of(rewards=(0.0, 1.0, 1.0), probs=(0.5, 0.3, 0.2))
    unbiased = Estimator(gate=TRIAL, choice="unbiased", advantages=grpo)
    ungated = Estimator(gate=GateConfig(mode="off", n_init=3, n_cont=2), advantages=grpo)

    assert cosine(binary, unbiased) == pytest.approx(1.0)
    assert degrees(PARTIAL_CREDIT, ungated) == pytest.approx(3.6, abs=0.05)
    assert degrees(PARTIAL_CREDIT, unbiased) == pytest.approx(8.8, abs=0.05)
    every = Estimator(gate=TRIAL, choice="all", advantages=grpo)
    assert degrees(PARTIAL_CREDIT, every) == pytest.approx(48.6, abs=0.05)


def degrees(policies: Policies, estimator: Estimator) -> float:
    return math.degrees(math.acos(cosine(policies, estimator)))
