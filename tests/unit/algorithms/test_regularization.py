"""KL estimators and the entropy bonus, against exact sums over a distribution of four tokens."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.regularization import (
    MAX_K3,
    ReferenceDivergence,
    Regularization,
    bounded_k3,
    k1,
    k2,
    k3,
)

LOGITS_V = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REFERENCE_V = torch.tensor([0.5, 0.4, -0.6, 0.0], dtype=torch.float64).log_softmax(-1)
BEHAVIOUR_V = torch.tensor([0.0, -0.7, 1.0, 0.3], dtype=torch.float64).log_softmax(-1)


def gradient(loss: Callable[[Tensor], Tensor], logits_V: Tensor = LOGITS_V) -> Tensor:
    """Gradient (V,) of a function of log pi (V,) with respect to the logits."""
    logits_V = logits_V.clone().requires_grad_()
    (gradient_V,) = torch.autograd.grad(loss(logits_V.log_softmax(-1)), logits_V)
    return gradient_V


def reverse_kl(pi_V: Tensor) -> Tensor:
    return (pi_V.exp() * (pi_V - REFERENCE_V)).sum()


def forward_kl(pi_V: Tensor) -> Tensor:
    return (REFERENCE_V.exp() * (REFERENCE_V - pi_V)).sum()


def expected(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Mean over samples of pi, whose probabilities have no gradient."""
    return lambda pi_V: (pi_V.detach().exp() * estimator(pi_V, REFERENCE_V)).sum()


def one_of_each(pi_V: Tensor) -> LossTokens:
    return LossTokens(
        logprobs_N=pi_V,
        behaviour_logprobs_N=BEHAVIOUR_V,
        advantages_N=torch.zeros(4),
        ages_N=torch.zeros(4, dtype=torch.int64),
        sequence_ids_N=torch.arange(4),
        num_sequences=4,
        reference_logprobs_N=REFERENCE_V,
    )


def test_values_of_the_estimators() -> None:
    pi, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert k1(pi, reference).item() == pytest.approx(math.log(2))
    assert k2(pi, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(pi, reference).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert k3(torch.tensor([-1000.0]), torch.tensor([-1.0])).isfinite().all()


def test_k1_and_k3_have_the_mean_of_the_reverse_divergence() -> None:
    pi_V = LOGITS_V.log_softmax(-1)
    for estimator in (k1, k3):
        torch.testing.assert_close(expected(estimator)(pi_V), reverse_kl(pi_V))


def test_k2_in_the_loss_has_the_gradient_of_the_reverse_divergence() -> None:
    torch.testing.assert_close(gradient(expected(k2)), gradient(reverse_kl))


def test_k3_in_the_loss_has_the_gradient_of_the_forward_divergence() -> None:
    torch.testing.assert_close(gradient(expected(k3)), gradient(forward_kl))


def test_a_loss_takes_a_bounded_k3_whose_gradient_is_bounded_too() -> None:
    x_N = torch.linspace(-30, 30, 6001, dtype=torch.float64).requires_grad_()  # log(pi / ref)
    values_N = bounded_k3(x_N, torch.zeros_like(x_N))
    (gradient_N,) = torch.autograd.grad(values_N.sum(), x_N)

    exact_N, is_bounded_N = 1 - (-x_N).exp(), k3(x_N, torch.zeros_like(x_N)) > MAX_K3
    torch.testing.assert_close(gradient_N, exact_N.masked_fill(is_bounded_N, 0.0))
    assert values_N.max().item() == MAX_K3
    assert 12.5 < gradient_N.abs().max().item() < 12.62  # 1 - ref / pi at k3 = 10
    assert 0.2 < is_bounded_N.double().mean().item() < 0.8


def test_a_token_beyond_the_bound_of_k3_is_left_out_of_the_gradient() -> None:
    """Token 1 has ref / pi above 100. Without the bound, the gradient is that of KL(ref, pi)."""
    far_V = torch.tensor([False, True, False, False])
    pi_V = LOGITS_V.masked_fill(far_V, -7.0).log_softmax(-1)
    chosen = Regularization(kl="k3", kl_coefficient=1.0)
    ratios_V = (REFERENCE_V - pi_V).exp()
    assert ratios_V[1] > 100 > 10 > ratios_V[[0, 2, 3]].max()

    def loss(pi_V: Tensor) -> Tensor:
        on_policy = replace(one_of_each(pi_V), behaviour_logprobs_N=pi_V.detach())
        return (pi_V.detach().exp() * chosen.losses(on_policy, torch.zeros(4))).sum()

    def without_the_token(pi_V: Tensor) -> Tensor:
        weights_V = (pi_V.exp() - REFERENCE_V.exp()).detach()
        return (weights_V.masked_fill(far_V, 0.0) * pi_V).sum()

    torch.testing.assert_close(gradient(loss, pi_V), gradient(without_the_token, pi_V))
    torch.testing.assert_close(gradient(expected(k3), pi_V), gradient(forward_kl, pi_V))
    assert not torch.allclose(gradient(loss, pi_V), gradient(forward_kl, pi_V), atol=0.1)


def test_k1_in_the_loss_would_have_no_gradient_and_in_the_reward_has_that_of_k2() -> None:
    torch.testing.assert_close(gradient(expected(k1)), torch.zeros(4, dtype=torch.float64))
    in_reward = gradient(expected(lambda pi_V, ref_V: k1(pi_V, ref_V).detach() * pi_V))
    torch.testing.assert_close(in_reward, gradient(reverse_kl))


@pytest.mark.parametrize(("kl", "divergence"), [("k2", reverse_kl), ("k3", forward_kl)])
def test_the_loss_is_corrected_for_samples_of_another_policy(kl, divergence) -> None:
    chosen = Regularization(kl=kl, kl_coefficient=0.3, max_ratio=10.0)

    def loss(pi_V: Tensor) -> Tensor:
        return (BEHAVIOUR_V.exp() * chosen.losses(one_of_each(pi_V), torch.zeros(4))).sum()

    torch.testing.assert_close(gradient(loss), 0.3 * gradient(divergence))


def test_the_weight_of_the_loss_is_capped() -> None:
    chosen = Regularization(kl="k2", kl_coefficient=1.0, max_ratio=0.5)
    pi_V = LOGITS_V.log_softmax(-1)
    ratios_V = (pi_V - BEHAVIOUR_V).exp().clamp(max=0.5)
    assert (ratios_V == 0.5).any()
    torch.testing.assert_close(
        chosen.losses(one_of_each(pi_V), torch.zeros(4)), ratios_V * k2(pi_V, REFERENCE_V)
    )


def test_the_entropy_is_subtracted_from_the_loss() -> None:
    chosen = Regularization(entropy_coefficient=0.5)
    entropies_N = torch.tensor([1.0, 2.0, 0.0, 4.0])
    losses_N = chosen.losses(one_of_each(LOGITS_V), entropies_N)
    assert losses_N.tolist() == [-0.5, -1.0, 0.0, -2.0]


def test_the_metric_is_the_mean_over_all_micro_batches() -> None:
    divergence, pi_V = ReferenceDivergence(), LOGITS_V.log_softmax(-1)
    assert divergence.metrics() == {}
    for _ in range(2):
        divergence.add(one_of_each(pi_V))
    assert divergence.metrics() == {
        "reference_kl_k1": pytest.approx((pi_V - REFERENCE_V).mean().item()),
        "reference_kl_k3": pytest.approx(k3(pi_V, REFERENCE_V).mean().item()),
    }
