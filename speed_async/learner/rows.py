"""Grouping of completions into rows and micro-batches.

A row is one prompt followed by `width` of its completions, so that the prompt is computed once for
all of them, and so are tokens with which several completions begin: a row is a prefix tree. Width 1
is the usual padded batch. The last token of a completion predicts nothing and is not part of the
input.

Shape legend: P prompt tokens, T completion tokens, N completions of one group.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from speed_async.algorithms.objective import GroupSignal
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
    """Ordered so that completions with a common beginning are adjacent."""
    overlaps: tuple[int, ...]
    """For each sample, the number of input tokens that it shares with the one before it; 0 for the
    first."""

    @property
    def num_tokens(self) -> int:
        """Input tokens of the row."""
        inputs = sum(len(sample.token_ids) for sample in self.samples) - len(self.samples)
        return len(self.prompt_token_ids) + inputs - sum(self.overlaps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCost:
    """Forward cost of a layout in FLOPs, per position and per mask entry."""

    per_token: float
    per_pair: float

    def of(self, row_lengths: Sequence[int]) -> float:
        lengths = np.asarray(row_lengths, dtype=np.float64)
        return float(self.per_token * lengths.sum() + self.per_pair * (lengths**2).sum())


def training_rows(
    groups: Sequence[Group], signals: Sequence[GroupSignal], *, with_zero_advantage: bool
) -> list[TrainingRow]:
    """One row per group. Raises ValueError as `training_row`."""
    return [
        training_row(
            group,
            advantages_N=signal.advantages_N,
            weights_N=signal.weights_N,
            kept_N=signal.trained_N,
            with_zero_advantage=with_zero_advantage,
        )
        for group, signal in zip(groups, signals, strict=True)
    ]


def training_row(
    group: Group,
    *,
    advantages_N: NDArray[np.float64],
    weights_N: NDArray[np.float64],
    kept_N: NDArray[np.bool_],
    with_zero_advantage: bool = False,
) -> TrainingRow:
    """The completions of a group that contribute to the gradient, as one row. These are the kept,
    non-empty completions with a non-zero advantage (or any, `with_zero_advantage`). There may be
    none.

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
    return make_row(group.prompt_token_ids, samples)


def make_row(prompt_token_ids: Int32Array, samples: Iterable[TrainingSample]) -> TrainingRow:
    # The order of bytes is not that of token ids, but it also places common beginnings together.
    ordered = sorted(
        ((sample.token_ids.tobytes(), sample) for sample in samples), key=itemgetter(0)
    )
    overlaps = [0] * min(1, len(ordered))
    for (tokens, sample), (next_tokens, next_sample) in pairwise(ordered):
        if tokens == next_tokens:
            overlaps.append(len(sample.token_ids) - 1)
        else:
            overlaps.append(_overlap(sample.token_ids, next_sample.token_ids))
    return TrainingRow(
        prompt_token_ids=prompt_token_ids,
        samples=tuple(sample for _, sample in ordered),
        overlaps=tuple(overlaps),
    )


def _overlap(one: Int32Array, other: Int32Array) -> int:
    """Number of equal tokens at the beginning of both inputs."""
    num_inputs = min(len(one), len(other)) - 1
    differs = one[:num_inputs] != other[:num_inputs]
    return int(differs.argmax()) if differs.any() else num_inputs


def reweighted(row: TrainingRow, weights_N: NDArray[np.float64]) -> TrainingRow:
    """The row of a group with these weights of its completions."""
    samples = (replace(sample, weight=float(weights_N[sample.index])) for sample in row.samples)
    return replace(row, samples=tuple(samples))


def split_row(row: TrainingRow, width: int) -> Iterator[TrainingRow]:
    """Splits a row into rows of `width` completions. A row without completions yields nothing."""
    for start in range(0, len(row.samples), width):
        yield TrainingRow(
            prompt_token_ids=row.prompt_token_ids,
            samples=row.samples[start : start + width],
            overlaps=(0, *row.overlaps[start + 1 : start + width]),
        )


def lay_out(row: TrainingRow, cost: LayoutCost) -> list[TrainingRow]:
    """The row of a group as rows whose completions share the prompt, in the cheapest of a few
    widths. A completion that fills half of a shared row is alone, and does not keep the others from
    sharing."""
    limit = MAX_PACKED_TOKENS // 2 - len(row.prompt_token_ids)
    short = [sample for sample in row.samples if len(sample.token_ids) <= limit]
    if len(short) == len(row.samples):
        return list(split_row(row, choose_width(row, cost)))
    long = [sample for sample in row.samples if len(sample.token_ids) > limit]
    others = make_row(row.prompt_token_ids, short)
    alone = (make_row(row.prompt_token_ids, [sample]) for sample in long)
    return [*alone, *split_row(others, choose_width(others, cost))]


def choose_width(row: TrainingRow, cost: LayoutCost) -> int:
    """Number of completions per row, given the row of a group: the cheapest of a few candidates, or
    1 when the gain of sharing is below MIN_PACKING_GAIN."""
    largest = max(1, len(row.samples))
    inputs_C = np.array([len(sample.token_ids) - 1 for sample in row.samples], np.int64)
    costs: dict[int, float] = {}
    for parts in (largest, 1, 2, 3, 4, 6, 8):
        width = -(-largest // parts)
        lengths = _part_lengths(row, inputs_C, width) if row.samples else []
        if width == 1 or max(lengths) <= MAX_PACKED_TOKENS:
            costs[width] = cost.of(lengths)
    best = min(costs, key=lambda width: costs[width])
    return best if costs[1] >= MIN_PACKING_GAIN * costs[best] else 1


def _part_lengths(row: TrainingRow, inputs_C: NDArray[np.int64], width: int) -> list[int]:
    """`num_tokens` of the rows that `split_row` makes, without making them."""
    starts = np.arange(0, len(inputs_C), width)
    overlaps_C = np.array(row.overlaps)
    own = np.add.reduceat(inputs_C - overlaps_C, starts) + overlaps_C[starts]
    return (len(row.prompt_token_ids) + own).tolist()


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
