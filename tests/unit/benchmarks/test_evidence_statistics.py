"""The statistics of the evidence: hand-computed values, enumeration, infinite costs."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.evidence.statistics import compare, estimate, holm, interval, p_value


def ranked(negative: set[int], count: int = 10) -> np.ndarray:
    """Differences 1..count in magnitude, those in `negative` with a minus sign."""
    return np.array([-float(i) if i in negative else float(i) for i in range(1, count + 1)])


@pytest.mark.parametrize(
    ("negative", "num_subsets"),
    [(set(), 1), ({8}, 25), ({9}, 33)],  # subsets of 1..10 with at most the sum of `negative`
)
def test_p_values_count_the_sign_patterns_that_are_as_extreme(negative: set[int], num_subsets: int):
    assert p_value(ranked(negative)) == pytest.approx(2 * num_subsets / 2**10, rel=1e-12)


def test_p_values_with_ties_equal_the_enumeration_of_all_signs():
    differences = np.array([1.0, -1.0, 2.0, 2.0, 3.0, -0.5, 2.0, 0.0])
    ranks = [2.5, 2.5, 5.0, 5.0, 7.0, 1.0, 5.0]  # of 1 1 2 2 3 .5 2; the zero is dropped
    observed = 2.5 + 5 + 5 + 7 + 5
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    upper = sum(each >= observed for each in sums) / len(sums)
    assert p_value(differences) == pytest.approx(2 * upper, rel=1e-12)


def test_the_interval_ends_at_the_walsh_averages_of_the_critical_rank():
    # The critical value of 10 pairs at 5 % is 8, so the ends are the 9th averages from either side:
    # 1, 1.5, 2, 2, 2.5, 2.5, 3, 3, 3 from below.
    differences = ranked(set())
    assert interval(differences) == (3.0, 8.0)
    assert estimate(differences) == 5.5


def test_five_pairs_cannot_give_an_interval_and_six_can():
    six = np.arange(1, 7, dtype=np.float64)
    five = six[:5]
    assert interval(five) == (-math.inf, math.inf)
    assert interval(six) == (1.0, 6.0)


def test_an_interval_contains_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = (interval(rng.laplace(0.5, 1.0, 8)) for _ in range(1000))
    covered = sum(low <= 0.5 <= high for low, high in draws)
    assert covered >= 950 - 5 * math.sqrt(1000 * 0.95 * 0.05)


def test_a_ratio_is_estimated_on_the_log_scale():
    ratio = compare([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    assert ratio.estimate == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert ratio.p_value == 2 / 2**6


def test_a_run_that_never_arrives_has_the_highest_rank():
    # Seven pairs favour the first arm by log 2 (rank 4 each), one favours the base (rank 8). Of the
    # 256 sign patterns 1 + 7 + 21 + 1 have a rank sum of at most 8.
    ratio = compare([1.0] * 7 + [math.inf], [2.0] * 8)
    assert ratio.p_value == pytest.approx(2 * 30 / 256, rel=1e-12)
    assert ratio.estimate == pytest.approx(0.5)
    assert math.isinf(ratio.high)


def test_a_pair_that_arrives_in_neither_arm_says_nothing():
    finite = compare([1.0] * 6, [2.0] * 6)
    assert compare([1.0] * 6 + [math.inf] * 3, [2.0] * 6 + [math.inf] * 3) == finite
    nothing = compare([math.inf] * 6, [math.inf] * 6)
    assert (nothing.num_pairs, nothing.p_value) == (0, 1.0)
    assert (nothing.low, nothing.high) == (0.0, math.inf)


def test_a_base_that_never_arrives_gives_a_ratio_of_zero():
    ratio = compare([1.0] * 6, [math.inf] * 6)
    assert (ratio.estimate, ratio.low, ratio.high) == (0.0, 0.0, 0.0)
    few = compare([1.0] * 5, [math.inf] * 5)
    assert (few.low, few.high) == (0.0, math.inf)


def test_opposite_infinite_pairs_cancel():
    ratio = compare([1.0, math.inf], [math.inf, 1.0])
    assert ratio.p_value == 1.0
    assert (ratio.low, ratio.high) == (0.0, math.inf)
    assert estimate(np.array([-math.inf, math.inf, 0.5])) == 0.5


def test_holm_multiplies_by_the_number_of_hypotheses_left_and_never_decreases():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
