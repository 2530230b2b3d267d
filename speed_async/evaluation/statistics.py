"""Estimates from several samples per prompt, with confidence intervals over prompts.

Shape legend: P prompts, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
RESAMPLED_VALUES = 4_000_000
"""Values drawn at a time, which bounds the memory of a bootstrap."""
_SEED = 20_210_707
"""Fixed, so that the same samples always give the same interval."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over prompts with its interval."""

    value: float
    low: float
    high: float
    num_prompts: int
    """Prompts with a value."""

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that at least one of k samples passes, drawn from n without replacement.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374),
    equation 1. Raises ValueError when k exceeds n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs {k} samples, but there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def pass_ks(num_samples: int) -> list[int]:
    """The k of the reported pass@k: powers of two, and `num_samples` itself."""
    powers = {2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples}
    return sorted(powers | {num_samples})


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """The majority of the extracted answers of one prompt."""

    value: float
    """1 when the majority is correct, 0 when it is not; on a tie, the share of the tied answers
    that are correct, which is the expectation of a random choice among them."""
    num_tied: int
    """Answers that share the first place; 1 is no tie, 0 is a prompt without any answer."""


def majority(classes: Sequence[int | None], passed: Sequence[bool]) -> Vote:
    """maj@k of one prompt, from the class of equal answers of each sample (None: no answer).

    A class is correct when most of its samples passed (half counts as half). Samples without an
    answer do not vote.
    """
    votes: dict[int, list[bool]] = {}
    for answer_class, has_passed in zip(classes, passed, strict=True):
        if answer_class is not None:
            votes.setdefault(answer_class, []).append(has_passed)
    if not votes:
        return Vote(value=0.0, num_tied=0)
    most = max(len(each) for each in votes.values())
    first = [each for each in votes.values() if len(each) == most]
    correct = [(2 * sum(each) > most) + 0.5 * (2 * sum(each) == most) for each in first]
    return Vote(value=sum(correct) / len(first), num_tied=len(first))


def bootstrap(
    values: Sequence[float] | Float64Array,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Mean of one value per prompt, with the percentile interval of a prompt-level bootstrap.

    Prompts are resampled with replacement (Efron and Tibshirani 1993, section 13.3); the samples of
    a prompt stay together, because they are not independent. Prompts without a value (NaN) are
    ignored. When all prompts have value 0, or all have value 1, resampling cannot vary, and the
    interval is that of Clopper and Pearson 1934 for 0 or P of P prompts. Without any value, all
    fields are NaN.
    """
    values_P = _present(values)
    count = len(values_P)
    if not count:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, num_prompts=0)
    mean = float(values_P.mean())
    exact = _interval_without_variation(values_P, confidence)
    if exact is not None:
        low, high = exact
    else:
        low, high = _percentiles(_resampled_means(values_P, num_resamples), confidence)
    return Estimate(value=mean, low=low, high=high, num_prompts=count)


def paired_bootstrap(
    differences: Sequence[float] | Float64Array,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Mean of the differences of two models on the same prompts, with the percentile interval.

    A resampled prompt brings both of its values, so what is hard for both models cancels. NaN as in
    `bootstrap`.
    """
    return bootstrap_mean_of_means(
        [differences], confidence=confidence, num_resamples=num_resamples
    )


def bootstrap_mean_of_means(
    parts: Sequence[Sequence[float] | Float64Array],
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """The unweighted mean of the means of several suites; prompts are resampled in each suite."""
    present = [values_P for part in parts if len(values_P := _present(part))]
    if not present:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, num_prompts=0)
    means_R = np.mean(
        [_resampled_means(part, num_resamples, stream=i) for i, part in enumerate(present)], axis=0
    )
    low, high = _percentiles(means_R, confidence)
    return Estimate(
        value=float(np.mean([part.mean() for part in present])),
        low=low,
        high=high,
        num_prompts=sum(map(len, present)),
    )


def _present(values: Sequence[float] | Float64Array) -> Float64Array:
    values_P = np.asarray(values, np.float64)
    return values_P[~np.isnan(values_P)]


def _resampled_means(
    values_P: Float64Array, num_resamples: int, *, stream: int = 0
) -> Float64Array:
    """Means (R,) of resampled prompts."""
    random = np.random.default_rng([_SEED, stream])
    count = len(values_P)
    at_once = max(1, min(num_resamples, RESAMPLED_VALUES // count))
    means: list[Float64Array] = []
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        means.append(values_P[random.integers(0, count, (rows, count))].mean(axis=1))
    return np.concatenate(means)


def _percentiles(means_R: Float64Array, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return float(low), float(high)


def _interval_without_variation(
    values_P: Float64Array, confidence: float
) -> tuple[float, float] | None:
    bound = ((1 - confidence) / 2) ** (1 / len(values_P))
    if (values_P == 0).all():
        return 0.0, 1 - bound
    if (values_P == 1).all():
        return bound, 1.0
    return None
