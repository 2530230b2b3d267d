import math

import pytest
import torch

from speed_async.algorithms import corrections
from speed_async.algorithms.loss_tokens import Corrected, LossTokens, TokenLosses
from speed_async.algorithms.losses import cispo, gspo, policy_gradient, ppo_clip
from tests.fakes.learner_samples import make_loss_tokens


def weighted(tokens: LossTokens, weights: list[float]) -> Corrected:
    """Anchor mu, with these weights."""
    no_tokens_N = torch.zeros(len(weights), dtype=torch.bool)
    return Corrected(
        anchor_logprobs_N=tokens.behaviour_logprobs_N,
        weights_N=torch.tensor(weights, dtype=torch.float64),
        truncated_N=no_tokens_N,
        masked_N=no_tokens_N,
    )


def gradient(tokens: LossTokens, losses: TokenLosses) -> list[float]:
    """d loss / d log pi of each token."""
    losses.losses_N.sum().backward()
    assert tokens.logprobs_N.grad is not None
    return tokens.logprobs_N.grad.tolist()


def test_policy_gradient_loss_and_gradient():
    tokens = make_loss_tokens(pi=[0.5, 0.25, 0.1], mu=[0.25, 0.5, 0.1], advantages=[2.0, -1.0, 3.0])

    losses = policy_gradient(tokens, corrections.token_tis(tokens, max_ratio=1.5))

    # ratios 2, 0.5, 1; truncated to 1.5, 0.5, 1
    assert losses.losses_N.tolist() == pytest.approx(
        [-1.5 * 2 * math.log(0.5), 0.5 * math.log(0.25), -3 * math.log(0.1)], rel=1e-12
    )
    assert not losses.clipped_N.any()
    assert gradient(tokens, losses) == pytest.approx([-1.5 * 2, 0.5, -3.0])


def test_ppo_clips_by_the_sign_of_the_advantage():
    # ratios 2, 2, 0.5, 0.5, 1.1 with advantages +, -, +, -, +
    tokens = make_loss_tokens(
        pi=[0.4, 0.4, 0.1, 0.1, 0.22], mu=[0.2] * 5, advantages=[1.0, -1.0, 1.0, -1.0, 2.0]
    )
    corrected = weighted(tokens, [1.0, 1.0, 1.0, 3.0, 0.5])

    losses = ppo_clip(tokens, corrected, clip_low=0.2, clip_high=0.28, dual_clip=3.0)

    assert losses.losses_N.tolist() == pytest.approx([-1.28, 2.0, -0.5, 3 * 0.8, -1.1])
    assert losses.clipped_N.tolist() == [True, False, False, True, False]
    assert gradient(tokens, losses) == pytest.approx([0.0, 2.0, -0.5, 0.0, -1.1])


def test_the_dual_clip_ends_the_gradient_of_a_token_with_negative_advantage():
    # ratios 2.5, 3.5, 3.5 and e^5 with advantages -, -, + and -
    tokens = make_loss_tokens(
        pi=[0.25, 0.35, 0.35, 0.5], mu=[0.1, 0.1, 0.1, 0.5 * math.exp(-5)],
        advantages=[-1.0, -2.0, 1.0, -1.0],
    )  # fmt: skip

    losses = ppo_clip(
        tokens, weighted(tokens, [1.0, 0.5, 1.0, 1.0]), clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )

    assert losses.losses_N.tolist() == pytest.approx([2.5, 0.5 * 3 * 2, -1.28, 3.0])
    assert losses.dual_clipped_N is not None
    assert losses.dual_clipped_N.tolist() == [False, True, False, True]
    assert losses.clipped_N.tolist() == [False, False, True, False]
    assert gradient(tokens, losses) == pytest.approx([2.5, 0.0, 0.0, 0.0])


def test_the_dual_clip_of_gspo_is_on_the_ratio_of_the_sequence():
    # ratios 8, 2 and 8, 1: geometric means 4 and 2.83
    tokens = make_loss_tokens(
        pi=[0.8, 0.2, 0.8, 0.1], mu=[0.1] * 4, advantages=[-1.0] * 4, sequences=[0, 0, 1, 1]
    )

    losses = gspo(tokens, weighted(tokens, [1.0] * 4), clip_low=0.2, clip_high=0.2, dual_clip=3.0)

    assert losses.losses_N.tolist() == pytest.approx([3.0, 3.0, 8**0.5, 8**0.5])
    assert gradient(tokens, losses) == pytest.approx([0.0, 0.0, 8**0.5, 8**0.5])


@pytest.mark.parametrize(("dual_clip", "cosine"), [(3.0, 1.0), (1e9, 0.064)])
def test_one_surprising_token_does_not_turn_the_gradient(dual_clip: float, cosine: float):
    """Ninety tokens near ratio 1 and one with negative advantage at log-ratio 5."""
    on_policy = [0.5] * 90
    signs = [1.0, -1.0] * 45
    tokens = make_loss_tokens(
        pi=[*on_policy, 0.5], mu=[*on_policy, 0.5 * math.exp(-5)], advantages=[*signs, -1.0]
    )
    losses = ppo_clip(
        tokens, corrections.none(tokens), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    without_it = torch.tensor([*(-sign for sign in signs), 0.0])

    direction = torch.tensor(gradient(tokens, losses))

    # without the dual clip sqrt(90) / sqrt(90 + e^10)
    assert torch.cosine_similarity(direction, without_it, dim=0).item() == pytest.approx(
        cosine, abs=1e-3
    )


def test_cispo_clips_the_ratio_and_keeps_the_gradient():
    # ratios 8, 2, 0.5, clipped at 1 + 4
    tokens = make_loss_tokens(pi=[0.8, 0.2, 0.05], mu=[0.1] * 3, advantages=[1.0, -1.0, 2.0])

    losses = cispo(tokens, weighted(tokens, [1.0, 1.0, 0.5]), clip_high=4.0)

    assert losses.losses_N.tolist() == pytest.approx(
        [-5 * math.log(0.8), 2 * math.log(0.2), -0.5 * 0.5 * 2 * math.log(0.05)]
    )
    assert losses.clipped_N.tolist() == [True, False, False]
    assert gradient(tokens, losses) == pytest.approx([-5.0, 2.0, -0.5])


def test_gspo_uses_the_geometric_mean_ratio_of_the_sequence():
    # ratios 4, 1 and 1, 1.21: geometric means 2 and 1.1
    tokens = make_loss_tokens(
        pi=[0.4, 0.1, 0.1, 0.121], mu=[0.1] * 4, advantages=[-1.0, -1.0, 1.0, 1.0],
        sequences=[0, 0, 1, 1],
    )  # fmt: skip

    losses = gspo(
        tokens, weighted(tokens, [1.0, 0.5, 1.0, 1.0]), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )

    assert losses.losses_N.tolist() == pytest.approx([2.0, 1.0, -1.1, -1.1])
    assert not losses.clipped_N.any()
    assert gradient(tokens, losses) == pytest.approx([2.0, 1.0, -1.1, -1.1])


def test_gspo_clips_whole_sequences():
    tokens = make_loss_tokens(
        pi=[0.4, 0.1, 0.1, 0.025], mu=[0.1] * 4, advantages=[1.0, 1.0, -1.0, -1.0],
        sequences=[0, 0, 1, 1],
    )  # fmt: skip

    losses = gspo(tokens, weighted(tokens, [1.0] * 4), clip_low=0.2, clip_high=0.2, dual_clip=3.0)

    assert losses.losses_N.tolist() == pytest.approx([-1.2, -1.2, 0.8, 0.8])
    assert losses.clipped_N.all()
    assert gradient(tokens, losses) == [0.0] * 4


def test_a_token_without_advantage_has_no_gradient_in_any_loss():
    for loss in (
        policy_gradient,
        lambda t, c: ppo_clip(t, c, clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        lambda t, c: cispo(t, c, clip_high=4.0),
        lambda t, c: gspo(t, c, clip_low=0.2, clip_high=0.2, dual_clip=3.0),
    ):
        tokens = make_loss_tokens(pi=[0.5, 0.1], mu=[0.1, 0.5], advantages=[0.0, 0.0])
        losses = loss(tokens, corrections.none(tokens))
        assert not losses.clipped_N.any()
        assert [abs(value) for value in gradient(tokens, losses)] == [0.0, 0.0]
