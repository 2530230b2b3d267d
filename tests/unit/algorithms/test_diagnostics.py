import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from speed_async.algorithms.corrections import none, token_mask, token_tis
from speed_async.algorithms.diagnostics import (
    Diagnostics,
    batch_metrics,
    pass_rate_histogram,
    screening_metrics,
    shaping_metrics,
)
from speed_async.algorithms.loss_tokens import Corrected, LossTokens
from speed_async.algorithms.losses import ppo_clip
from speed_async.algorithms.objective import GroupSignal
from speed_async.types import Group
from tests.fakes.learner_samples import make_completion, make_group, make_loss_tokens


def add(
    diagnostics: Diagnostics, tokens: LossTokens, corrected: Corrected, entropies: list[float]
) -> None:
    losses = ppo_clip(tokens, corrected, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    diagnostics.add(
        tokens,
        corrected,
        losses,
        loss=losses.losses_N.sum() / 4,
        entropies_N=torch.tensor(entropies),
    )


def test_diagnostics_of_two_tokens():
    tokens = make_loss_tokens(pi=[0.5, 0.25], mu=[0.25, 0.5], advantages=[1.0, 1.0])
    diagnostics = Diagnostics()
    add(diagnostics, tokens, token_tis(tokens, max_ratio=1.5), [0.2, 0.6])

    assert diagnostics.metrics() == pytest.approx(
        {
            "loss": -(1.5 + 0.5) / 4,
            "ratio_mean": 1.25,
            "ratio_max": 2.0,
            "weight_mean": 1.0,
            "token_weight_max": 1.5,
            "clipped_share": 0.0,  # the anchor is the policy itself
            "dual_clipped_share": 0.0,
            "truncated_share": 0.5,
            "masked_share": 0.0,
            "kl_k1": 0.0,  # -(log 2 + log 1/2) / 2
            "kl_k3": 0.25,  # ((2 - 1 - log 2) + (1/2 - 1 + log 2)) / 2
            "effective_sample_size": 2.5**2 / (2 * (4 + 0.25)),
            "entropy": 0.4,
        },
        abs=1e-7,
    )


def test_masked_and_clipped_tokens_are_counted_separately():
    tokens = make_loss_tokens([0.5, 0.25, 0.1, 0.1], [0.25, 0.5, 0.1, 0.1], [1.0] * 4)
    masked = token_mask(tokens, min_ratio=0.6, max_ratio=3.0)
    anchored = replace(masked, anchor_logprobs_N=tokens.behaviour_logprobs_N)
    diagnostics = Diagnostics()
    add(diagnostics, tokens, anchored, [0.0] * 4)

    metrics = diagnostics.metrics()

    assert metrics["masked_share"] == 0.25
    assert metrics["clipped_share"] == 0.25
    assert metrics["truncated_share"] == 0.0


def test_the_dual_clip_and_the_largest_token_weight_are_reported():
    # ratios 2, 2 and 4 at negative advantages: the last is beyond the dual clip at 3
    tokens = make_loss_tokens([0.5, 0.5, 0.8], [0.25, 0.25, 0.2], [-1.0, -2.0, -5.0])
    diagnostics = Diagnostics()
    add(diagnostics, tokens, none(tokens), [0.0] * 3)

    metrics = diagnostics.metrics()

    assert metrics["dual_clipped_share"] == pytest.approx(1 / 3)
    assert metrics["clipped_share"] == 0.0
    assert metrics["token_weight_max"] == pytest.approx(2 * 2)


def test_diagnostics_do_not_depend_on_micro_batches():
    pi, mu, advantages = [0.5, 0.25, 0.1], [0.25, 0.5, 0.4], [1.0, -2.0, 0.5]
    full, split = Diagnostics(), Diagnostics()
    for diagnostics, cuts in ((full, [slice(0, 3)]), (split, [slice(0, 1), slice(1, 3)])):
        for cut in cuts:
            tokens = make_loss_tokens(pi[cut], mu[cut], advantages[cut])
            add(diagnostics, tokens, token_tis(tokens, max_ratio=1.5), [0.1, 0.2, 0.3][cut])

    assert split.metrics() == pytest.approx(full.metrics(), rel=1e-12)


def test_metrics_of_extreme_ratios_are_finite():
    tokens = make_loss_tokens([0.5], [1e-300], [1.0])
    diagnostics = Diagnostics()
    add(diagnostics, tokens, token_tis(tokens, max_ratio=2.0), [0.0])

    assert all(math.isfinite(value) for value in diagnostics.metrics().values())


def test_metrics_without_tokens_have_only_a_zero_loss():
    assert Diagnostics().metrics() == {"loss": 0.0}


def passing(num_passed: int, num_completions: int) -> Group:
    rewards = [1.0] * num_passed + [0.0] * (num_completions - num_passed)
    return make_group([1], *[make_completion([2], reward) for reward in rewards])


def test_the_histogram_has_separate_bins_for_0_and_1():
    groups = [
        passing(0, 24), passing(1, 24), passing(3, 10), passing(29, 100), passing(23, 24),
        passing(24, 24), passing(24, 24),
    ]  # fmt: skip

    histogram = pass_rate_histogram(groups)

    assert len(histogram) == 12
    assert {key: count for key, count in histogram.items() if count} == {
        "pass_rate_histogram/0": 1.0,
        "pass_rate_histogram/0.0-0.1": 1.0,
        "pass_rate_histogram/0.2-0.3": 1.0,  # 0.29
        "pass_rate_histogram/0.3-0.4": 1.0,  # 0.3 itself
        "pass_rate_histogram/0.9-1.0": 1.0,
        "pass_rate_histogram/1": 2.0,
    }


def test_metrics_of_an_example_batch():
    first = make_group(
        [1],
        make_completion([2, 3], 1.0, finish_reason="length"),
        make_completion([4], 0.0),
        make_completion([], 0.0),
    )
    flat = make_group([1], make_completion([5, 6, 7], 0.5), make_completion([8, 9], 0.5))

    metrics = batch_metrics([first, flat])

    assert metrics["trained_reward_mean"] == pytest.approx(0.4)
    assert metrics["pass_rate_mean"] == pytest.approx(1 / 6)
    assert metrics["zero_signal_groups"] == 1.0
    assert metrics["zero_signal_share"] == 0.5
    assert metrics["completion_tokens_mean"] == pytest.approx(8 / 5)
    assert metrics["empty_completions"] == 1.0
    assert metrics["cut_completions"] == metrics["cut_passed"] == 1.0
    assert metrics["pass_rate_histogram/0"] == 1.0
    assert metrics["pass_rate_histogram/0.3-0.4"] == 1.0


def signal(kept: list[bool]) -> GroupSignal:
    return GroupSignal(
        advantages_N=np.zeros(len(kept)),
        weights_N=np.zeros(len(kept)),
        kept_N=np.array(kept),
        shaping_N=np.linspace(-1.0, 0.0, len(kept)),
        masked_N=np.zeros(len(kept), np.bool_),
    )


def test_the_pivotal_share_is_relative_to_screening_samples():
    completions = [make_completion([2], 0.0)] * 3
    screened = [make_group([1], *completions, num_screening=2) for _ in range(2)]
    signals = [signal([False, True, True]), signal([True, True, True])]

    assert screening_metrics(screened, signals) == {"pivotal_share": 0.25}
    assert screening_metrics([make_group([1], *completions)], signals[1:]) == {}


def test_the_mean_of_the_overlong_penalty_is_over_completions():
    signals = [signal([True, True, True]), signal([True, True])]
    assert shaping_metrics(signals) == {"reward/overlong": pytest.approx(-0.5)}
