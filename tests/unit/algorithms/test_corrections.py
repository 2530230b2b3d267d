import pytest
import torch

from speed_async.algorithms import corrections
from speed_async.algorithms.loss_tokens import Corrected, LossTokens
from tests.fakes.learner_samples import make_loss_tokens

# Ratios 2, 0.5, 1 of one token each.
PI, MU = [0.5, 0.25, 0.1], [0.25, 0.5, 0.1]
# Two sequences: ratios 2, 0.5, 2 (together 2) and 0.5, 0.5 (together 0.25).
LONG_PI, LONG_MU = [0.4, 0.1, 0.4, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]
LONG_SEQUENCES = [0, 0, 0, 1, 1]


def single() -> LossTokens:
    return make_loss_tokens(PI, MU, [1.0, 1.0, 1.0])


def double(advantages: list[float] | None = None) -> LossTokens:
    return make_loss_tokens(LONG_PI, LONG_MU, advantages or [1.0] * 5, sequences=LONG_SEQUENCES)


def weights(corrected: Corrected) -> list[float]:
    return [round(weight, 12) for weight in corrected.weights_N.tolist()]


def anchors(corrected: Corrected) -> list[float]:
    return corrected.anchor_logprobs_N.exp().tolist()


def test_none_has_weight_one_and_anchor_mu():
    corrected = corrections.none(single())

    assert weights(corrected) == [1.0, 1.0, 1.0]
    assert anchors(corrected) == pytest.approx(MU)
    assert not corrected.truncated_N.any()
    assert not corrected.masked_N.any()


def test_token_tis_truncates_each_ratio_at_the_cap():
    corrected = corrections.token_tis(single(), max_ratio=1.5)

    assert weights(corrected) == [1.5, 0.5, 1.0]
    assert anchors(corrected) == pytest.approx(PI)
    assert corrected.truncated_N.tolist() == [True, False, False]
    assert not corrected.masked_N.any()


def test_sequence_tis_uses_the_ratio_of_the_sequence():
    corrected = corrections.sequence_tis(double(), max_ratio=1.5)

    assert weights(corrected) == [1.5, 1.5, 1.5, 0.25, 0.25]
    assert anchors(corrected) == pytest.approx(LONG_PI)
    assert corrected.truncated_N.tolist() == [True, True, True, False, False]


def test_token_mask_keeps_ratios_within_the_bounds():
    corrected = corrections.token_mask(single(), min_ratio=0.6, max_ratio=2.5)

    assert weights(corrected) == [2.0, 0.0, 1.0]
    assert anchors(corrected) == pytest.approx(PI)
    assert corrected.masked_N.tolist() == [False, True, False]
    assert not corrected.truncated_N.any()


def test_token_mask_bounds_are_inclusive():
    corrected = corrections.token_mask(
        make_loss_tokens([0.5, 0.25], [0.25, 0.5], [1.0, 1.0]), min_ratio=0.5, max_ratio=2.0
    )
    assert weights(corrected) == [2.0, 0.5]


def test_sequence_mask_masks_whole_sequences():
    corrected = corrections.sequence_mask(double(), min_ratio=0.5, max_ratio=2.5)

    assert weights(corrected) == [2.0, 2.0, 2.0, 0.0, 0.0]
    assert corrected.masked_N.tolist() == [False, False, False, True, True]


def test_geometric_tis_uses_the_geometric_mean_of_the_ratios():
    corrected = corrections.geometric_tis(double(), max_ratio=1.1)

    # 2 ** (1 / 3) = 1.26 and 0.25 ** (1 / 2)
    assert weights(corrected) == [1.1, 1.1, 1.1, 0.5, 0.5]
    assert anchors(corrected) == pytest.approx(LONG_PI)
    assert corrected.truncated_N.tolist() == [True, True, True, False, False]


def test_geometric_mask_masks_whole_sequences_by_the_geometric_mean():
    corrected = corrections.geometric_mask(double(), min_ratio=0.6, max_ratio=1.5)

    assert weights(corrected) == [round(2 ** (1 / 3), 12)] * 3 + [0.0, 0.0]
    assert corrected.masked_N.tolist() == [False, False, False, True, True]


def test_probability_mask_masks_changes_in_the_direction_of_the_gradient():
    # changes 0.25, 0.25, -0.25, -0.25 and 0.01 with ratios 2, 2, 0.5, 0.5 and 11
    pi, mu = [0.5, 0.5, 0.25, 0.25, 0.011], [0.25, 0.25, 0.5, 0.5, 0.001]
    tokens = make_loss_tokens(pi, mu, [1.0, -1.0, 1.0, -1.0, 1.0])

    corrected = corrections.probability_mask(tokens, max_ratio=4.0, max_probability_change=0.2)

    assert weights(corrected) == [0.0, 2.0, 0.5, 0.0, 4.0]
    assert anchors(corrected) == pytest.approx(pi)
    assert corrected.masked_N.tolist() == [True, False, False, True, False]
    assert corrected.truncated_N.tolist() == [False, False, False, False, True]


def test_negative_sequence_mask_masks_unlikely_failed_sequences():
    # mean of log(mu / pi): -log(2)/3 in the first sequence, log 2 in the second
    failed, passed = double([-1.0] * 5), double([1.0] * 5)

    corrected = corrections.negative_sequence_mask(failed, max_negative_kl=0.6)

    assert weights(corrected) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert corrected.masked_N.tolist() == [False, False, False, True, True]
    assert anchors(corrected) == pytest.approx(LONG_MU)
    assert weights(corrections.negative_sequence_mask(failed, max_negative_kl=0.7)) == [1.0] * 5
    assert weights(corrections.negative_sequence_mask(passed, max_negative_kl=0.6)) == [1.0] * 5


def test_corrections_have_no_gradient():
    tokens = double([-1.0] * 5)
    for corrected in (
        corrections.none(tokens),
        corrections.token_tis(tokens, max_ratio=2.0),
        corrections.sequence_tis(tokens, max_ratio=2.0),
        corrections.token_mask(tokens, min_ratio=0.5, max_ratio=2.0),
        corrections.sequence_mask(tokens, min_ratio=0.5, max_ratio=2.0),
        corrections.geometric_tis(tokens, max_ratio=2.0),
        corrections.geometric_mask(tokens, min_ratio=0.5, max_ratio=2.0),
        corrections.probability_mask(tokens, max_ratio=2.0, max_probability_change=0.2),
        corrections.negative_sequence_mask(tokens, max_negative_kl=0.1),
    ):
        assert not corrected.weights_N.requires_grad
        assert not corrected.anchor_logprobs_N.requires_grad


def test_ratios_beyond_the_float_range_stay_finite():
    tokens = LossTokens(
        logprobs_N=torch.tensor([-1.0, -1.0]),
        behaviour_logprobs_N=torch.tensor([-500.0, -500.0]),
        advantages_N=torch.tensor([1.0, 1.0]),
        ages_N=torch.tensor([2, 0]),
        sequence_ids_N=torch.tensor([0, 0]),
        num_sequences=1,
    )
    for corrected in (
        corrections.token_tis(tokens, max_ratio=2.0),
        corrections.sequence_tis(tokens, max_ratio=2.0),
        corrections.geometric_tis(tokens, max_ratio=2.0),
        corrections.probability_mask(tokens, max_ratio=2.0, max_probability_change=0.5),
    ):
        assert corrected.weights_N.tolist() == [2.0, 2.0]
    assert corrections.token_mask(tokens, min_ratio=0.5, max_ratio=2.0).masked_N.all()
    assert corrections.sequence_mask(tokens, min_ratio=0.5, max_ratio=2.0).masked_N.all()
