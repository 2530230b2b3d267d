"""Which completions go through the model together: rows, how wide, and how many at a time.

A row is one prompt followed by the completions of `width` siblings, so a prompt is computed once
for all of them. Width 1 is the usual padded batch. The last token of a completion predicts
nothing and is not fed.

Shape legend: P prompt tokens, T completion tokens, N completions of one group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speed_async.types import Float32Array, Group, Int32Array

MAX_PACKED_TOKENS = 2048
"""Longest shared row: the mask of a row takes L x L floats."""
MIN_PACKING_GAIN = 1.2
"""Estimated gain under which prompts are not shared: plain causal attention has faster kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One completion to learn from; never empty."""

    token_ids: Int32Array  # (T,)
    logprobs: Float32Array  # (T,) log mu
    policy_versions: Int32Array  # (T,)
    advantage: float
    weight: float
    """Factor on each token's loss (algorithms/aggregation.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    prompt_token_ids: Int32Array  # (P,)
    samples: tuple[TrainingSample, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + sum(len(s.token_ids) - 1 for s in self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCost:
    """Forward cost of a layout in FLOPs: so much for a position, so much for a mask entry."""

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
) -> Row:
    """All of a group that has a gradient, as one row: completions that are kept, of an advantage
    other than 0, and not empty, in order of length. The row may hold none.

    Raises ValueError for an empty prompt, whose first completion token has no predictor.
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
        )
        for completion, advantage, weight, kept in zip(
            group.completions, advantages_N, weights_N, kept_N, strict=True
        )
        if kept and advantage != 0.0 and completion.num_tokens
    ]
    samples.sort(key=lambda sample: len(sample.token_ids))
    return Row(prompt_token_ids=group.prompt_token_ids, samples=tuple(samples))


def split_row(row: Row, width: int) -> Iterator[Row]:
    """The same completions, `width` to a row; none give no row."""
    for start in range(0, len(row.samples), width):
        yield Row(prompt_token_ids=row.prompt_token_ids, samples=row.samples[start : start + width])


def choose_width(rows: Sequence[Row], cost: LayoutCost) -> int:
    """How many siblings share a row, given whole groups: the cheapest of a few, or 1 when sharing
    gains too little."""
    largest = max((len(row.samples) for row in rows), default=1)
    costs: dict[int, float] = {}
    for parts in (largest, 1, 2, 3, 4, 6, 8):
        width = max(1, -(-largest // max(parts, 1)))
        lengths = [part.num_tokens for row in rows for part in split_row(row, width)]
        if width == 1 or max(lengths, default=0) <= MAX_PACKED_TOKENS:
            costs[width] = cost.of(lengths)
    best = min(costs, key=lambda width: costs[width])
    return best if costs[1] >= MIN_PACKING_GAIN * costs[best] else 1


def split_rows(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Longest rows first, at most `max_tokens` padded positions each; a longer row goes alone.

    Longest first: if memory is short, the first micro-batch of the first update says so.
    """
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if not parts or (len(parts[-1]) + 1) * parts[-1][0].num_tokens > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts
