"""Paired comparisons of costs, some of which are infinite: a run that never reached its target.

The cost of an arm relative to another is a ratio; all statistics are of the differences of
logarithms, one per seed. A pair in which only one side is infinite has the difference +inf or -inf:
it counts, with the highest rank. A pair in which both are infinite says nothing about the ratio and
is left out.

Sources: signed-rank test, Wilcoxon 1945, "Individual comparisons by ranking methods"; estimate and
interval by inversion of the test, Hodges and Lehmann 1963, "Estimates of location based on rank
tests"; adjustment, Holm 1979, "A simple sequentially rejective multiple test procedure".

Shape legend: P pairs, W Walsh averages P (P + 1) / 2, R doubled rank sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
EPSILON = 1e-12
"""Probabilities that differ by less are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A paired comparison. Ratios below 1 favour the first arm."""

    num_pairs: int
    """Pairs in which at least one side is finite."""
    estimate: float
    """Hodges-Lehmann estimate. NaN without pairs."""
    low: float
    high: float
    """Interval of `CONFIDENCE`; (0, inf) with fewer than 6 pairs."""
    p_value: float
    """Of the hypothesis that the ratio is 1, two-sided."""


def compare(costs: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio costs / base. `costs[i]` and `base[i]` share a seed; all are positive."""
    differences_P = log_differences(costs, base)
    low, high = interval(differences_P)
    return Ratio(
        num_pairs=len(differences_P),
        estimate=math.exp(estimate(differences_P)),
        low=math.exp(low),
        high=math.exp(high),
        p_value=p_value(differences_P),
    )


def log_differences(costs: Sequence[float], base: Sequence[float]) -> NDArray[np.float64]:
    """(P,) log costs minus log base, without the pairs in which both are infinite."""
    pairs = [
        (own, other)
        for own, other in zip(costs, base, strict=True)
        if math.isfinite(own) or math.isfinite(other)
    ]
    return np.array([math.log(own) - math.log(other) for own, other in pairs])


def p_value(differences_P: NDArray[np.float64]) -> float:
    """Exact two-sided p-value of the signed-rank test that the differences are symmetric about 0.

    Zeros are dropped. Equal magnitudes share their mean rank, and the null distribution is the one
    of these ranks with random signs, so it is exact with ties too.
    """
    return min(1.0, 2 * min(_tails(differences_P)))


def _tails(differences_P: NDArray[np.float64]) -> tuple[float, float]:
    """Probabilities, under the null, of a positive rank sum that is at most and at least the
    observed one."""
    differences_P = differences_P[differences_P != 0]
    ranks_P = doubled_ranks(np.abs(differences_P))
    statistic = int(ranks_P[differences_P > 0].sum())
    probabilities_R = _null_distribution(ranks_P)
    lower = probabilities_R[: statistic + 1].sum()
    upper = probabilities_R[statistic:].sum()
    return float(lower), float(upper)


def doubled_ranks(magnitudes_P: NDArray[np.float64]) -> NDArray[np.int64]:
    """(P,) twice the ranks 1..P; equal magnitudes get their mean rank, so the double is whole."""
    below_P = (magnitudes_P[:, None] > magnitudes_P[None, :]).sum(1)
    equal_P = (magnitudes_P[:, None] == magnitudes_P[None, :]).sum(1)
    return 2 * below_P + equal_P + 1


def _null_distribution(doubled_ranks_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R,) probability of each doubled sum of the positive ranks, if all signs are fair coins."""
    probabilities_R = np.zeros(int(doubled_ranks_P.sum()) + 1)
    probabilities_R[0] = 1.0
    for rank in doubled_ranks_P.tolist():
        shifted_R = np.roll(probabilities_R, rank)
        shifted_R[:rank] = 0.0
        probabilities_R = (probabilities_R + shifted_R) / 2
    return probabilities_R


def estimate(differences_P: NDArray[np.float64]) -> float:
    """Hodges-Lehmann estimate: the median of the Walsh averages. NaN without differences."""
    if not len(differences_P):
        return math.nan
    lower, upper = _walsh_averages(differences_P)
    # The average of +inf and -inf is undefined: it counts half at each end.
    both_W = np.sort(np.concatenate([lower, upper]))
    middle = len(both_W) // 2
    below, above = float(both_W[middle - 1]), float(both_W[middle])
    return below if below == above else (below + above) / 2


def interval(differences_P: NDArray[np.float64]) -> tuple[float, float]:
    """All shifts that the test does not reject at 1 - `CONFIDENCE`, as a closed interval.

    The statistic decreases with the shift and changes only at Walsh averages, so one shift between
    two neighbours stands for all of them. An end is infinite if no finite shift is rejected on that
    side.
    """
    averages = np.unique(np.concatenate(_walsh_averages(differences_P)))
    averages = averages[np.isfinite(averages)].tolist()
    ends = [-math.inf, *averages, math.inf]
    between = [(low + high) / 2 for low, high in pairwise(averages)]
    shifts = [averages[0] - 1, *between, averages[-1] + 1] if averages else [0.0]
    tails = [_tails(differences_P - shift) for shift in shifts]
    too_low = sum(upper < TAIL - EPSILON for _, upper in tails)  # the first ones
    too_high = sum(lower < TAIL - EPSILON for lower, _ in tails)  # the last ones
    return ends[too_low], ends[len(shifts) - too_high]


def _walsh_averages(
    differences_P: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(W,) twice: averages of all pairs of differences, of each with itself too. An average of +inf
    and -inf is -inf in the first and +inf in the second."""
    first, second = np.triu_indices(len(differences_P))
    with np.errstate(invalid="ignore"):
        averages_W = (differences_P[first] + differences_P[second]) / 2
    undefined_W = np.isnan(averages_W)
    return (
        np.where(undefined_W, -math.inf, averages_W),
        np.where(undefined_W, math.inf, averages_W),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given. Their comparison with a level controls the
    probability of any false rejection among all of them."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - position)))
        adjusted[index] = highest
    return adjusted
