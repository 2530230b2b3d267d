"""One optimiser update, gradient over micro-batches, clipping, step, and the result of several."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from speed_async.algorithms.diagnostics import Diagnostics
from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.objective import Objective
from speed_async.algorithms.regularization import ReferenceDivergence
from speed_async.learner.batch import MicroBatch
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks
from speed_async.learner.parallel.sharding import whole
from speed_async.learner.policy import Policy

Metrics = dict[str, float]
MIN_WEIGHT_MEAN = 1e-8
"""Smallest divisor of self-normalised weights; verl does not divide by a smaller mean. It is that
of an update in which every completion has become all but impossible under the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """Result of the update of one batch. Metrics are finite; unavailable values are absent."""

    optimizer_updates: int
    num_skipped: int
    """Optimiser updates skipped because a value was not finite."""
    skip_reason: str
    """Empty when none was skipped."""
    tokens: int
    completions: int
    metrics: Metrics

    @property
    def skipped(self) -> bool:
        """Whether the batch changed nothing."""
        return self.optimizer_updates == 0


def update_parameters(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    grad_clip: float,
    ranks: Ranks = ONE_RANK,
    before_step: Callable[[], None] = lambda: None,
) -> Metrics:
    """Accumulates the gradient over all micro-batches, then steps if `loss` and `grad_norm` are
    finite, after a call of `before_step`. Returns the metrics of `Diagnostics`, and the norm before
    clipping. With self-normalised weights, `loss` and `token_weight_max` are after the division.

    With several ranks, each has the same number of micro-batches. All metrics are over all ranks,
    so that all ranks step or none does.
    """
    diagnostics, divergence = Diagnostics(), ReferenceDivergence()
    optimizer.zero_grad(set_to_none=True)
    for batch in micro_batches:
        logprobs_N, entropies_N = policy(batch)
        if batch.is_filler:
            (0.0 * logprobs_N.sum()).backward()
            continue
        # Not the output of the policy itself, where a backward pass of sharded parameters begins:
        # the diagnostics take the gradient of the losses with respect to it.
        logprobs_N = logprobs_N.view_as(logprobs_N)
        tokens = LossTokens(
            logprobs_N=logprobs_N,
            behaviour_logprobs_N=batch.behaviour_logprobs_N,
            advantages_N=batch.advantages_N,
            ages_N=batch.ages_N,
            sequence_ids_N=batch.sequence_ids_N,
            num_sequences=batch.num_sequences,
            proximal_logprobs_N=batch.proximal_logprobs_N,
            reference_logprobs_N=batch.reference_logprobs_N,
        )
        corrected = objective.correction(tokens)
        losses = objective.policy_loss(tokens, corrected)
        losses_N = losses.losses_N
        if objective.regularization.has_loss:
            losses_N = losses_N + objective.regularization.losses(tokens, entropies_N)
        loss = (batch.weights_N * losses_N).sum()
        # Before `backward` frees the graph, which the weights of the tokens need.
        diagnostics.add(tokens, corrected, losses, loss=loss, entropies_N=entropies_N)
        loss.backward()
        divergence.add(tokens)
    _fill_missing_gradients(policy)
    metrics = diagnostics.metrics(ranks.gather) | divergence.metrics(ranks.gather)
    if objective.normalizes_weights and "weight_mean" in metrics:
        divisor = max(metrics["weight_mean"], MIN_WEIGHT_MEAN)
        _divide_gradients(policy, divisor)
        metrics["loss"] /= divisor
        metrics["token_weight_max"] /= divisor
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip, foreach=True)
    metrics["grad_norm"] = float(whole(norm))
    if not non_finite(metrics):
        before_step()
        optimizer.step()
    return metrics


def non_finite(metrics: Metrics) -> str:
    """Names of the values that made `update_parameters` skip the step; empty if it stepped."""
    return " and ".join(k for k in ("loss", "grad_norm") if not math.isfinite(metrics[k]))


def combine(updates: Sequence[Metrics]) -> Metrics:
    """Metrics of a batch from those of its optimiser updates: means, for `..._max` the maximum.
    Updates that were not finite count only if all of them were."""
    counted = [metrics for metrics in updates if not non_finite(metrics)] or updates
    keys = dict.fromkeys(key for metrics in counted for key in metrics)
    values = {key: [metrics[key] for metrics in counted if key in metrics] for key in keys}
    return {
        key: max(found) if key.endswith("_max") else sum(found) / len(found)
        for key, found in values.items()
    }


def _divide_gradients(policy: Policy, divisor: float) -> None:
    for parameter in policy.parameters():
        if parameter.grad is not None:
            parameter.grad /= divisor


def _fill_missing_gradients(policy: Policy) -> None:
    """Sets missing gradients to zero: a batch without signal is still a step, with momentum and
    weight decay."""
    for parameter in policy.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
