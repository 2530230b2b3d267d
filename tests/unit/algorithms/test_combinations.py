"""Every combination of advantage, policy loss, aggregation and correction against its definition.

The definitions are written a second time here, in plain Python over one token at a time, with the
derivative by hand. All parts are built from their configured names.

Shape legend: G groups, T tokens of one completion.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from speed_async.algorithms.diagnostics import Diagnostics
from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.objective import compute_signals, make_objective
from speed_async.config.sections.objective import ADVANTAGES, POLICY_LOSSES, ObjectiveConfig
from speed_async.types import Group
from tests.fakes.learner_samples import (
    make_completion,
    make_config,
    make_group,
    make_loss_tokens,
)

AGGREGATIONS = get_args(ObjectiveConfig.model_fields["aggregation"].annotation)
CORRECTIONS = get_args(ObjectiveConfig.model_fields["correction"].annotation)
MAX_TOKENS = 5
LOW, HIGH = {"min_ratio": 0.8}, {"max_ratio": 1.25}
LIMITS: dict[str, dict[str, float]] = {
    "none": {},
    "token_tis": HIGH,
    "sequence_tis": HIGH,
    "sequence_snis": HIGH,
    "geometric_tis": HIGH,
    "token_mask": LOW | HIGH,
    "sequence_mask": LOW | HIGH,
    "geometric_mask": LOW | HIGH,
    "probability_mask": HIGH | {"max_probability_change": 0.1},
    "negative_sequence_mask": {"max_negative_kl": 0.1},
}
CLIPS: dict[str, float] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One completion."""

    reward: float
    group: int
    log_pi: list[float]  # (T,)
    log_mu: list[float]  # (T,)


def make_sequences(seed: int) -> list[Sequence]:
    draw = random.Random(seed)
    sequences = []
    for group, size in enumerate((3, 2, 5)):
        for i in range(size):
            length = draw.randint(1, MAX_TOKENS)
            log_mu = [draw.uniform(-2.5, -0.3) for _ in range(length)]
            shift = draw.gauss(0, 0.2)
            sequences.append(
                Sequence(
                    reward=[1.0, 0.0, 0.25][i % 3],
                    group=group,
                    log_mu=log_mu,
                    log_pi=[min(each + draw.gauss(shift, 0.4), -0.01) for each in log_mu],
                )
            )
    return sequences


SEQUENCES = make_sequences(0)


def members(group: int) -> list[Sequence]:
    return [each for each in SEQUENCES if each.group == group]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    return math.sqrt(sum((each - mean(values)) ** 2 for each in values) / (len(values) - 1))


def advantage_of(name: str, one: Sequence) -> float:
    if name == "batch":
        everything = [each.reward for each in SEQUENCES]
        return (one.reward - mean(everything)) / (deviation(everything) + 1e-4)
    rewards = [each.reward for each in members(one.group)]
    if name == "shrunken":  # towards the mean of the other groups, with a weight of 2 completions
        prior = mean([each.reward for each in SEQUENCES if each.group != one.group])
        return one.reward - (2 * prior + sum(rewards) - one.reward) / (2 + len(rewards) - 1)
    centred = one.reward - mean(rewards)
    return {
        "rloo": centred * len(rewards) / (len(rewards) - 1),
        "grpo": centred / (deviation(rewards) + 1e-4),
        "dr_grpo": centred,
    }[name]


def token_weight(name: str, one: Sequence) -> float:
    num_tokens = sum(len(each.log_pi) for each in SEQUENCES)
    num_prompts = len({each.group for each in SEQUENCES})
    return {
        "token_mean": 1 / num_tokens,
        "sequence_mean": 1 / (len(SEQUENCES) * len(one.log_pi)),
        "prompt_mean": 1 / (num_prompts * sum(len(each.log_pi) for each in members(one.group))),
        "fixed_length": 1 / (len(SEQUENCES) * MAX_TOKENS),
    }[name]


def ratio_of(level: str, one: Sequence, t: int) -> float:
    logs = [pi - mu for pi, mu in zip(one.log_pi, one.log_mu, strict=True)]
    return math.exp({"token": logs[t], "sequence": sum(logs), "geometric": mean(logs)}[level])


def correction_of(name: str, advantage: float, one: Sequence, t: int) -> tuple[float, float]:
    """Weight and log-probability of the anchor."""
    if name == "none":
        return 1.0, one.log_mu[t]
    if name == "negative_sequence_mask":
        is_far = -math.log(ratio_of("geometric", one, t)) > 0.1
        return (0.0 if advantage < 0 and is_far else 1.0), one.log_mu[t]
    if name == "probability_mask":
        change = math.exp(one.log_pi[t]) - math.exp(one.log_mu[t])
        is_masked = change > 0.1 if advantage > 0 else change < -0.1
        return (0.0 if is_masked else min(ratio_of("token", one, t), 1.25)), one.log_pi[t]
    level, form = name.split("_")
    ratio = ratio_of(level, one, t)
    if form == "mask":
        return (ratio if 0.8 <= ratio <= 1.25 else 0.0), one.log_pi[t]
    weight = min(ratio, 1.25)
    if form == "snis":
        weight /= mean([min(ratio_of(level, each, 0), 1.25) for each in SEQUENCES])
    return weight, one.log_pi[t]


def loss_of(name: str, advantage: float, ratio: float, log_pi: float) -> tuple[float, float]:
    """Loss of one token of weight 1, and its derivative with respect to log pi."""
    if name == "policy_gradient":
        return -advantage * log_pi, -advantage
    if name == "cispo":
        factor = min(ratio, 1.28)
        return -factor * advantage * log_pi, -factor * advantage
    bound = None
    if advantage > 0 and ratio > 1.28:
        bound = 1.28
    elif advantage < 0 and ratio < 0.8:
        bound = 0.8
    elif advantage < 0 and ratio > 1.5:
        bound = 1.5
    if bound is None:
        return -ratio * advantage, -ratio * advantage
    return -bound * advantage, 0.0


def by_definition(advantage: str, loss: str, aggregation: str, correction: str) -> list[Any]:
    """[loss of the update, gradient of every token]"""
    total, gradient = 0.0, []
    for one in SEQUENCES:
        value = advantage_of(advantage, one)
        parts = [correction_of(correction, value, one, t) for t in range(len(one.log_pi))]
        log_ratios = [pi - anchor for pi, (_, anchor) in zip(one.log_pi, parts, strict=True)]
        for t, log_pi in enumerate(one.log_pi):
            log_ratio = mean(log_ratios) if loss == "gspo" else log_ratios[t]
            result = loss_of(loss, value, math.exp(log_ratio), log_pi)
            weight = token_weight(aggregation, one) * parts[t][0]
            total += weight * result[0]
            gradient.append(weight * result[1])
    return [total, *gradient]


def by_objective(folder: Path, **names: str) -> list[float]:
    objective = make_objective(
        make_config(
            folder,
            max_new_tokens=MAX_TOKENS,
            objective=ObjectiveConfig(**names, **CLIPS, **LIMITS[names["correction"]]),  # pyright: ignore
        )
    )
    groups = make_groups()
    signals = compute_signals(objective, groups)
    lengths = torch.tensor([len(each.log_pi) for each in SEQUENCES])

    def per_token(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values)).repeat_interleave(lengths)

    tokens = LossTokens(
        logprobs_N=torch.tensor(
            [x for each in SEQUENCES for x in each.log_pi], dtype=torch.float64, requires_grad=True
        ),
        behaviour_logprobs_N=torch.tensor(
            [x for each in SEQUENCES for x in each.log_mu], dtype=torch.float64
        ),
        advantages_N=per_token([signal.advantages_N for signal in signals]),
        ages_N=torch.zeros(int(lengths.sum()), dtype=torch.int64),
        sequence_ids_N=torch.arange(len(SEQUENCES)).repeat_interleave(lengths),
        num_sequences=len(SEQUENCES),
    )
    corrected = objective.correction(tokens)
    losses = objective.policy_loss(tokens, corrected)
    loss = (per_token([signal.weights_N for signal in signals]) * losses.losses_N).sum()
    if objective.normalizes_weights:
        first_of_each = torch.cumsum(lengths, 0) - lengths
        loss = loss / corrected.weights_N[first_of_each].mean()
    (gradient_N,) = torch.autograd.grad(loss, tokens.logprobs_N)
    return [loss.item(), *gradient_N.tolist()]


def make_groups() -> list[Group]:
    return [
        make_group(
            [1],
            *(make_completion([2] * len(each.log_pi), each.reward) for each in members(group)),
        )
        for group in range(3)
    ]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_combination_equals_its_definition(
    tmp_path: Path, loss: str, correction: str
) -> None:
    for advantage in ADVANTAGES:
        for aggregation in AGGREGATIONS:
            ours = by_objective(
                tmp_path,
                advantage=advantage,
                policy_loss=loss,
                aggregation=aggregation,
                correction=correction,
            )
            theirs = by_definition(advantage, loss, aggregation, correction)
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_every_clip_and_limit_acts_on_some_tokens_and_not_on_others() -> None:
    """Otherwise a combination could match without its clip or mask."""
    values = [
        (advantage_of("rloo", one), one, t) for one in SEQUENCES for t in range(len(one.log_pi))
    ]
    for name in set(CORRECTIONS) - {"none"}:
        weights = [correction_of(name, *each)[0] for each in values]
        limit = 0.0 if name.endswith("mask") else max(weights)
        is_limited = [weight == limit for weight in weights]
        assert any(is_limited) and not all(is_limited), name
    ratios = [(value, ratio_of("token", one, t)) for value, one, t in values]
    for sign, low, high in ((1, 1.28, 99), (-1, 0, 0.8), (-1, 1.5, 99), (-1, 0.8, 1.5)):
        assert any(sign * value > 0 and low < ratio < high for value, ratio in ratios)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy_loss", POLICY_LOSSES)
def test_every_objective_bounds_and_logs_the_weight_of_a_token_at_log_ratio_5(
    tmp_path: Path, policy_loss: str, correction: str
) -> None:
    """As when a mixture of experts routes a token otherwise than while sampling."""
    chosen = ObjectiveConfig.model_validate({"policy_loss": policy_loss, "correction": correction})
    objective = make_objective(make_config(tmp_path, objective=chosen))
    mu = [0.005, 0.2, 0.005, 0.2]
    tokens = make_loss_tokens(
        [0.005 * math.exp(5), 0.2] * 2, mu, [-2.0, -2.0, 2.0, 2.0], sequences=[0, 0, 1, 1]
    )
    corrected = objective.correction(tokens)
    losses = objective.policy_loss(tokens, corrected)
    diagnostics = Diagnostics()
    diagnostics.add(
        tokens, corrected, losses, loss=losses.losses_N.sum(), entropies_N=torch.zeros(4)
    )

    metrics = diagnostics.metrics()

    bounds = [1.0, chosen.dual_clip, 1 + chosen.clip_high, chosen.max_ratio or 0.0]
    assert 0.0 <= metrics["token_weight_max"] <= 2.0 * max(bounds) + 1e-9
    assert metrics["ratio_max"] == pytest.approx(math.exp(5))
    is_dual = policy_loss in ("ppo_clip", "gspo") and correction in (
        "none",
        "negative_sequence_mask",
    )
    # The negative token itself; with `gspo` both tokens of its sequence (ratio exp(2.5)).
    num_dual = (2 if policy_loss == "gspo" else 1) if is_dual else 0
    assert metrics["dual_clipped_share"] == num_dual / 4
