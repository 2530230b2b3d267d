"""Grouping of completions into rows and micro-batches.

A row is one prompt followed by `width` of its completions, so that the prompt is computed once for
all of them. Width 1 is the usual padded batch. The last token of a completion predicts nothing and
is not part of the input.

Shape legend: P prompt tokens, T completion tokens, N completions of one group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from speed_async.types import Float32Array, Group, Int32Array

MAX_PACKED_TOKENS = 2048
"""Largest length of a shared row. The mask of a row takes L x L floats."""
MIN_PACKING_GAIN = 1.2
"""Smallest estimated speed-up for which prompts are shared: plain causal attention has faster
kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One non-empty completion with its advantage and weight."""

    token_ids: Int32Array  # (T,)
    logprobs: Float32Array  # (T,) log mu
    policy_versions: Int32Array  # (T,)
    advantage: float
    weight: float
    """Factor on each token's loss (algorithms/aggregation.py)."""
    index: int = 0
    """Position in its group."""
    proximal_logprobs: Float32Array | None = None  # (T,) log pi_prox (algorithms/corrections.py)
    reference_logprobs: Float32Array | None = None  # (T,) of the reference policy


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    prompt_token_ids: Int32Array  # (P,)
    samples: tuple[TrainingSample, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + sum(len(s.token_ids) - 1 for s in self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCost:
    """Forward cost of a layout in FLOPs, per position and per mask entry."""

    per_token: float
    per_pair: float

    def of(self, row_lengths: Sequence[int]) -> float:
        lengths = np.asarray(row_lengths, dtype=np.float64)
        return float(self.per_token * lengths.sum() + self.per_pair * (lengths**2).sum())


def training_row(
    group: Group,
    *,
    advantages_N: NDArray[np.float64],
    weights_N: NDArray[np.float64],
    kept_N: NDArray[np.bool_],
    with_zero_advantage: bool = False,
) -> TrainingRow:
    """The completions of a group that contribute to the gradient, as one row. These are the kept,
    non-empty completions with a non-zero advantage (or any, `with_zero_advantage`), in order of
    length. There may be none.

    Raises ValueError for an empty prompt, after which no position predicts the first token.
    """
    if len(group.prompt_token_ids) == 0:
        raise ValueError(f"prompt {group.prompt_id} has no tokens")
    samples = [
        TrainingSample(
            token_ids=completion.sampled.token_ids,
            logprobs=completion.sampled.logprobs,
            policy_versions=completion.sampled.policy_versions,
            advantage=float(advantage),
            weight=float(weight),
            index=index,
        )
        for index, (completion, advantage, weight, kept) in enumerate(
            zip(group.completions, advantages_N, weights_N, kept_N, strict=True)
        )
        if kept and (with_zero_advantage or advantage != 0.0) and completion.num_tokens
    ]
    samples.sort(key=lambda sample: len(sample.token_ids))
    return TrainingRow(prompt_token_ids=group.prompt_token_ids, samples=tuple(samples))


def reweighted(row: TrainingRow, weights_N: NDArray[np.float64]) -> TrainingRow:
    """The row of a group with these weights of its completions."""
    samples = (replace(sample, weight=float(weights_N[sample.index])) for sample in row.samples)
    return replace(row, samples=tuple(samples))


def split_row(row: TrainingRow, width: int) -> Iterator[TrainingRow]:
    """Splits a row into rows of `width` completions. A row without completions yields nothing."""
    for start in range(0, len(row.samples), width):
        yield TrainingRow(
            prompt_token_ids=row.prompt_token_ids, samples=row.samples[start : start + width]
        )


def choose_width(rows: Sequence[TrainingRow], cost: LayoutCost) -> int:
    """Number of completions per row, given one row per group: the cheapest of a few candidates, or
    1 when the gain of sharing is below MIN_PACKING_GAIN."""
    largest = max((len(row.samples) for row in rows), default=1)
    costs: dict[int, float] = {}
    for parts in (largest, 1, 2, 3, 4, 6, 8):
        width = max(1, -(-largest // max(parts, 1)))
        lengths = [part.num_tokens for row in rows for part in split_row(row, width)]
        if width == 1 or max(lengths, default=0) <= MAX_PACKED_TOKENS:
            costs[width] = cost.of(lengths)
    best = min(costs, key=lambda width: costs[width])
    return best if costs[1] >= MIN_PACKING_GAIN * costs[best] else 1


def split_rows(rows: Sequence[TrainingRow], max_tokens: int) -> list[list[TrainingRow]]:
    """Micro-batches of at most `max_tokens` padded positions, longest rows first. A longer row has
    a micro-batch of its own.

    Because of this order, insufficient memory shows in the first micro-batch of the first update.
    """
    parts: list[list[TrainingRow]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if not parts or (len(parts[-1]) + 1) * parts[-1][0].num_tokens > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts
