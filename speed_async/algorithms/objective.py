"""The training objective: one strategy per component, selected by the configuration.

    raw rewards -> shaping -> advantages
    lengths -> aggregation -> weights          passes -> selection -> kept
    tokens -> correction -> policy loss        (learner/trainer.py, per micro-batch)

Shape legend: N completions of one group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speed_async.algorithms import advantages, aggregation, corrections, losses
from speed_async.algorithms.advantages import Advantages
from speed_async.algorithms.aggregation import Aggregation
from speed_async.algorithms.loss_tokens import Correction, PolicyLoss
from speed_async.algorithms.regularization import NO_REGULARIZATION, Regularization
from speed_async.algorithms.rewards import (
    completion_limit,
    overlong_buffer,
    soft_overlong_punishment,
)
from speed_async.algorithms.screening import kept
from speed_async.config.extensions import import_part
from speed_async.config.schema import Config
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.types import Group

Shaping = Callable[[NDArray[np.int64], int], NDArray[np.float64]]
"""Maps lengths (N,) and the prompt length, in tokens, to values added to the raw rewards (N,)."""
Selection = Callable[[NDArray[np.bool_], int], NDArray[np.bool_]]
"""Maps passes (N,) and the number of screening samples to a mask of kept completions (N,)."""

ANCHORED_AT_BEHAVIOUR = ("none", "negative_sequence_mask")
"""Corrections that do not use pi_prox."""
SELF_NORMALIZED = "sequence_snis"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    shaping: Shaping
    advantages: Advantages
    selection: Selection
    aggregation: Aggregation
    correction: Correction
    policy_loss: PolicyLoss
    has_fixed_proximal: bool = False
    """Whether pi_prox stays that of the start of the update over the optimiser updates of a batch
    (algorithms/corrections.py)."""
    masks_truncated: bool = False
    regularization: Regularization = NO_REGULARIZATION
    normalizes_weights: bool = False
    """Whether the gradient of an optimiser update is divided by the mean correction weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSignal:
    """Training signal of the completions of one group."""

    advantages_N: NDArray[np.float64]
    weights_N: NDArray[np.float64]  # factor on each token's loss
    kept_N: NDArray[np.bool_]  # whether `screening_samples` leaves it in the gradient
    shaping_N: NDArray[np.float64]  # what the overlong penalty added to the reward
    masked_N: NDArray[np.bool_]  # whether it is out of the gradient because it was truncated

    @property
    def trained_N(self) -> NDArray[np.bool_]:
        """Whether the completion enters the gradient."""
        return self.kept_N & ~self.masked_N


def make_objective(config: Config, *, context_length: int | None = None) -> Objective:
    """Builds the objective from the `objective`, `gate` and `actors` sections of the configuration.

    `context_length` is that of the model. It limits completions of long prompts to fewer than
    `actors.max_new_tokens` tokens.
    """
    chosen = config.objective
    limit = partial(completion_limit, config.actors.max_new_tokens, context_length=context_length)
    return Objective(
        shaping=partial(_overlong, chosen=chosen, limit=limit),
        advantages=_advantages(chosen),
        selection=partial(kept, gate=config.gate, choice=chosen.screening_samples),
        aggregation={
            "token_mean": aggregation.token_mean,
            "sequence_mean": aggregation.sequence_mean,
            "prompt_mean": aggregation.prompt_mean,
            "fixed_length": partial(aggregation.fixed_length, max_new_tokens=limit()),
        }[chosen.aggregation],
        correction=_correction(chosen),
        policy_loss=_policy_loss(chosen),
        has_fixed_proximal=(
            chosen.policy_loss != "policy_gradient"
            and chosen.correction not in ANCHORED_AT_BEHAVIOUR
        ),
        masks_truncated=chosen.mask_truncated,
        regularization=Regularization(
            kl=chosen.kl,
            kl_coefficient=chosen.kl_coefficient,
            entropy_coefficient=chosen.entropy_coefficient,
        ),
        normalizes_weights=chosen.correction == SELF_NORMALIZED,
    )


def compute_signals(
    objective: Objective,
    groups: Sequence[Group],
    kl: Sequence[NDArray[np.float64]] | None = None,
) -> list[GroupSignal]:
    """Advantages, weights and masks for all groups of an update, in order. `kl` has the sums of k1
    over the tokens of each completion (N,), for a KL divergence in the reward.

    The mask of kept completions follows from what passed, as in the gate. Advantages follow from
    shaped rewards, over all completions, also those that do not enter the gradient.
    Raises ValueError when a group or the update has too few completions for the advantage.
    """
    lengths = completion_lengths(groups)
    raw = [np.array([c.reward for c in group.completions], np.float64) for group in groups]
    passed = [np.array([c.passed for c in group.completions], np.bool_) for group in groups]
    shaping = [
        objective.shaping(lengths_N, len(group.prompt_token_ids))
        for group, lengths_N in zip(groups, lengths, strict=True)
    ]
    shaped = [raw_N + shaping_N for raw_N, shaping_N in zip(raw, shaping, strict=True)]
    if kl is not None:
        factor = objective.regularization.kl_coefficient
        shaped = [r_N - factor * kl_N for r_N, kl_N in zip(shaped, kl, strict=True)]
    truncated = [np.array([c.is_truncated for c in g.completions], np.bool_) for g in groups]
    return [
        GroupSignal(
            advantages_N=advantages_N,
            weights_N=weights_N,
            kept_N=objective.selection(passed_N, group.num_screening),
            shaping_N=shaping_N,
            masked_N=truncated_N & objective.masks_truncated,
        )
        for group, passed_N, shaping_N, truncated_N, advantages_N, weights_N in zip(
            groups,
            passed,
            shaping,
            truncated,
            objective.advantages(shaped),
            objective.aggregation(lengths),
            strict=True,
        )
    ]


def completion_lengths(groups: Sequence[Group]) -> list[NDArray[np.int64]]:
    """Lengths in tokens (N,) of each group."""
    return [np.array([c.num_tokens for c in g.completions], np.int64) for g in groups]


def _overlong(
    lengths_N: NDArray[np.int64],
    num_prompt_tokens: int,
    *,
    chosen: ObjectiveConfig,
    limit: Callable[..., int],
) -> NDArray[np.float64]:
    """Overlong penalty (N,), relative to the completion limit of this prompt."""
    max_length = limit(num_prompt_tokens=num_prompt_tokens)
    buffer = overlong_buffer(chosen.overlong_share, max_length)
    return soft_overlong_punishment(
        lengths_N, max_length=max_length, buffer=buffer, penalty=chosen.overlong_penalty
    )


def _advantages(chosen: ObjectiveConfig) -> Advantages:
    choices: dict[str, Advantages] = {
        "rloo": advantages.rloo,
        "shrunken": partial(advantages.shrunken, prior_weight=chosen.prior_weight),
        "grpo": advantages.grpo,
        "dr_grpo": advantages.dr_grpo,
        "batch": advantages.batch,
    }
    name = chosen.advantage
    return choices.get(name) or import_part("objective.advantage", name)


def _correction(chosen: ObjectiveConfig) -> Correction:
    cap: dict[str, Any] = {"max_ratio": chosen.max_ratio}
    band: dict[str, Any] = {"min_ratio": chosen.min_ratio, **cap}
    choices: dict[str, Correction] = {
        "none": corrections.none,
        "token_tis": partial(corrections.token_tis, **cap),
        "sequence_tis": partial(corrections.sequence_tis, **cap),
        SELF_NORMALIZED: partial(corrections.sequence_tis, **cap),
        "geometric_tis": partial(corrections.geometric_tis, **cap),
        "token_mask": partial(corrections.token_mask, **band),
        "sequence_mask": partial(corrections.sequence_mask, **band),
        "geometric_mask": partial(corrections.geometric_mask, **band),
        "probability_mask": partial(
            corrections.probability_mask,
            max_probability_change=chosen.max_probability_change,
            **cap,
        ),
        "negative_sequence_mask": partial(
            corrections.negative_sequence_mask, max_negative_kl=chosen.max_negative_kl
        ),
    }
    return choices[chosen.correction]


def _policy_loss(chosen: ObjectiveConfig) -> PolicyLoss:
    bounds = {
        "clip_low": chosen.clip_low,
        "clip_high": chosen.clip_high,
        "dual_clip": chosen.dual_clip,
    }
    choices: dict[str, PolicyLoss] = {
        "policy_gradient": losses.policy_gradient,
        "ppo_clip": partial(losses.ppo_clip, **bounds),
        "cispo": partial(losses.cispo, clip_high=chosen.clip_high),
        "gspo": partial(losses.gspo, **bounds),
    }
    return choices.get(chosen.policy_loss) or import_part(
        "objective.policy_loss", chosen.policy_loss
    )
