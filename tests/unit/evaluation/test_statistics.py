"""Estimates against hand-computed numbers and brute-force enumeration."""

import itertools
import math

import numpy as np
import pytest

from speed_async.evaluation.statistics import (
    bootstrap,
    bootstrap_mean_of_means,
    majority,
    pass_at_k,
    pass_ks,
)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 0), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_passed_sample(n: int, c: int) -> None:
    passed = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(passed, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    # 1 - prod over the k draws of the share of samples that failed
    expected = 1 - math.prod((10_000 - 100 - i) / (10_000 - i) for i in range(500))
    assert pass_at_k(10_000, 100, 500) == pytest.approx(expected)


def test_pass_at_k_refuses_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match="pass@4 needs 4 samples, but there are 3"):
        pass_at_k(3, 1, 4)


def test_reported_ks_are_powers_of_two_and_all_samples() -> None:
    assert pass_ks(1) == [1]
    assert pass_ks(12) == [1, 2, 4, 8, 12]
    assert pass_ks(16) == [1, 2, 4, 8, 16]


def test_the_majority_answer_decides() -> None:
    vote = majority([0, 1, 1, 2, 1], [True, False, False, False, False])
    assert (vote.value, vote.num_tied) == (0.0, 1)
    vote = majority([0, 0, 1, None, None, None], [True, True, False, False, False, False])
    assert (vote.value, vote.num_tied) == (1.0, 1)  # samples without an answer do not vote


def test_a_tie_counts_the_share_of_correct_answers_among_the_tied() -> None:
    vote = majority([0, 1, 2], [True, False, False])
    assert (vote.value, vote.num_tied) == (pytest.approx(1 / 3), 3)
    assert majority([None, None], [False, False]).num_tied == 0


def test_the_bootstrap_interval_matches_the_enumeration_of_all_resamples() -> None:
    values = [0.0, 0.25, 0.5, 1.0]
    means = [np.mean(each) for each in itertools.product(values, repeat=4)]
    estimate = bootstrap(values, num_resamples=100_000)
    assert estimate.value == np.mean(values) == 0.4375
    assert estimate.low == pytest.approx(np.quantile(means, 0.025), abs=0.0626)  # one step
    assert estimate.high == pytest.approx(np.quantile(means, 0.975), abs=0.0626)
    assert estimate == bootstrap(values, num_resamples=100_000)


def test_the_bootstrap_interval_of_many_prompts_is_the_normal_one() -> None:
    values = np.random.default_rng(0).random(2000)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert estimate.half_width == pytest.approx(half, rel=0.08)
    assert estimate.value == pytest.approx(values.mean())


def test_samples_of_one_prompt_do_not_narrow_the_interval() -> None:
    """16 equal samples of each prompt carry no more information than one."""
    one = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert bootstrap(one) == bootstrap([float(np.mean([value] * 16)) for value in one])
    assert bootstrap(one).half_width > 0.25


def test_without_variation_the_interval_is_exact_and_not_empty() -> None:
    estimate = bootstrap([0.0] * 30)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(0.1157, abs=1e-4)  # Clopper-Pearson for 0 of 30
    estimate = bootstrap([1.0] * 30)
    assert (estimate.low, estimate.high) == (pytest.approx(0.8843, abs=1e-4), 1.0)


def test_prompts_without_a_value_are_left_out() -> None:
    estimate = bootstrap([1.0, math.nan, 0.0, 0.5])
    assert estimate == bootstrap([1.0, 0.0, 0.5]) and estimate.num_prompts == 3
    assert math.isnan(bootstrap([math.nan]).value)


def test_the_mean_of_means_weighs_suites_equally() -> None:
    estimate = bootstrap_mean_of_means([[1.0] * 90 + [0.0] * 10, [0.0, 0.2]])
    assert estimate.value == pytest.approx((0.9 + 0.1) / 2) and estimate.num_prompts == 102
    assert estimate.low < estimate.value < estimate.high
