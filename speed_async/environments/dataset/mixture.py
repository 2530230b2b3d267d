"""Chooses the training and held-out prompts among the rows of all sources.

A prompt that occurs again, in the same source or a later one, is used once (its first row). Without
weights, each prompt is one training prompt. With weights, the training prompts are the smallest
number in which each source has its share and each prompt occurs at least once: prompts of a source
that is small for its weight occur repeatedly, all of them equally often, up to one. An epoch of the
curriculum is all training prompts.

Shape legend: N rows of all sources, T training prompts, H held-out prompts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speed_async.errors import ConfigError, DataError
from speed_async.types import Int32Array, UInt64Array

MIN_TRAIN_PROMPTS = 2
MAX_REPETITIONS = 20
"""Limit of the training prompts, relative to the distinct ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSource:
    path: str
    weight: float | None
    prompt_keys: UInt64Array
    """(n,) digests of the prompts; 64 bits: two of a million prompts collide with probability
    3e-8."""
    answer_keys: UInt64Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    train_T: Int32Array
    """Row of each training prompt, counted through all sources."""
    held_out_H: Int32Array
    num_repeated: int
    """Rows that repeat a prompt with the same answer."""
    num_contradicting: int
    """Rows that repeat a prompt with another answer."""


def mix(sources: Sequence[MixedSource], *, num_held_out: int, seed: int) -> Mixture:
    """Raises DataError (too few prompts) or ConfigError (too many held out, weights too uneven)."""
    keys_N = np.concatenate([source.prompt_keys for source in sources])
    answers_N = np.concatenate([source.answer_keys for source in sources])
    _, first, inverse_N = np.unique(keys_N, return_index=True, return_inverse=True)
    num_contradicting = int(np.count_nonzero(answers_N != answers_N[first[inverse_N]]))
    distinct = np.sort(first)
    bounds = np.cumsum([0] + [len(source.prompt_keys) for source in sources])
    parts = np.split(distinct, np.searchsorted(distinct, bounds[1:-1]))
    _check_size(sources, parts, num_held_out)
    held_out = _hold_out(sources, parts, num_held_out, seed)
    left = [np.setdiff1d(rows, out) for rows, out in zip(parts, held_out, strict=True)]
    return Mixture(
        train_T=np.concatenate(_weighted(sources, left, seed)).astype(np.int32),
        held_out_H=np.concatenate(held_out).astype(np.int32),
        num_repeated=len(keys_N) - len(distinct) - num_contradicting,
        num_contradicting=num_contradicting,
    )


def _check_size(
    sources: Sequence[MixedSource], parts: Sequence[NDArray[np.int64]], num_held_out: int
) -> None:
    for source, rows in zip(sources, parts, strict=True):
        if not len(rows):
            raise DataError(
                f"data set '{source.path}' has no prompt that the sources before it lack: remove it"
            )
    total = sum(map(len, parts))
    places = ", ".join(f"'{source.path}'" for source in sources)
    if total <= MIN_TRAIN_PROMPTS:
        raise DataError(
            f"data set {places} has {total} distinct prompts: at least {MIN_TRAIN_PROMPTS + 1} are "
            f"required ({MIN_TRAIN_PROMPTS} to train on and 1 held out)"
        )
    most = total - MIN_TRAIN_PROMPTS
    if num_held_out > most:
        raise ConfigError(
            "task.num_held_out",
            num_held_out,
            f"{places} has {total:,} distinct prompts; set it to {most} or less, or add prompts",
        )


def _hold_out(
    sources: Sequence[MixedSource], parts: Sequence[NDArray[np.int64]], num: int, seed: int
) -> list[NDArray[np.int64]]:
    """Held-out rows of each source, in its order: its share of `num`, sampled with the seed."""
    shares = [source.weight or len(rows) for source, rows in zip(sources, parts, strict=True)]
    exact = num * np.array(shares) / sum(shares)
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: num - counts.sum()]:
        counts[index] += 1
    rng = random.Random(seed)
    held_out: list[NDArray[np.int64]] = []
    for source, rows, count in zip(sources, parts, counts.tolist(), strict=True):
        if count >= len(rows):
            raise ConfigError(
                "task.num_held_out",
                num,
                f"by its weight, {count} of them are of '{source.path}', which has {len(rows)} "
                "distinct prompts; hold out fewer, or lower its weight",
            )
        held_out.append(rows[sorted(rng.sample(range(len(rows)), count))])
    return held_out


def _weighted(
    sources: Sequence[MixedSource], parts: Sequence[NDArray[np.int64]], seed: int
) -> list[NDArray[np.int64]]:
    """The training rows of each source, repeated by its weight."""
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources):
        return list(parts)
    shares = np.array(weights) / sum(weights)
    sizes = np.array([len(rows) for rows in parts])
    length = float(np.max(sizes / shares))
    if length > MAX_REPETITIONS * sizes.sum():
        rare = sources[int(np.argmax(sizes / shares))]
        raise ConfigError(
            "task.sources",
            [source.weight for source in sources],
            f"with these weights, one epoch that has each prompt of '{rare.path}' has "
            f"{length:,.0f} prompts, more than {MAX_REPETITIONS} times the distinct ones; raise "
            "the weight of that source",
        )
    rng = np.random.default_rng(seed)
    counts = np.maximum(np.round(shares * length).astype(int), sizes)
    return [np.resize(rng.permutation(rows), n) for rows, n in zip(parts, counts, strict=True)]
