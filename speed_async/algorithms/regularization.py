"""Terms beside the policy loss: KL divergence to a reference policy, and an entropy bonus.

With x = log pi - log ref of a sampled token, k1 = x, k2 = x^2 / 2 and k3 = e^-x - 1 + x. Under
samples of pi, k1 and k3 have mean KL(pi || ref), and k2 nearly so (Schulman 2020, "Approximating KL
Divergence"). As terms of a loss they differ in the gradient (Liu et al. 2025, "Rethinking KL
Regularization in RLHF", arXiv 2510.01555):

- k1 has gradient s = grad log pi, whose mean is 0: as a loss, it regularises nothing. It belongs in
  the reward, where it gives the gradient of the KL of the sequence.
- k2 has gradient x s, with mean grad KL(pi || ref) of the token's own distribution.
- k3 has gradient (1 - ref / pi) s, with mean grad KL(ref || pi), the other direction. Both agree to
  first order near ref. As ref / pi is unbounded, a loss takes at most MAX_K3 of a token.

In a loss, token losses ignore how a token changes the KL of later ones; the reward includes this.

Shape legend: N concatenated completion tokens of one micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speed_async.algorithms.loss_tokens import MAX_LOG_RATIO, LossTokens

MAX_KL_RATIO = 2.0
MAX_K3 = 10.0
"""As in verl. A token beyond it, with ref / pi above 13.6 or pi / ref above e^11, has no gradient;
below it, |1 - ref / pi| is at most 12.6."""
KlEstimator = Literal["k1", "k2", "k3"]


def k1(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    return logprobs_N - reference_logprobs_N


def k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    return (logprobs_N - reference_logprobs_N).square() / 2


def k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """GRPO's estimator (arXiv 2402.03300, equation 4)."""
    x_N = (logprobs_N - reference_logprobs_N).clamp(min=-MAX_LOG_RATIO)
    return (-x_N).exp() - 1 + x_N


def bounded_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """min(k3, MAX_K3). Source: verl's `kl_penalty` (`low_var_kl`)."""
    return k3(logprobs_N, reference_logprobs_N).clamp(max=MAX_K3)


LOSSES: dict[KlEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": bounded_k3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Regularization:
    """Coefficients of the terms; a coefficient of 0 removes its term."""

    kl: KlEstimator = "k2"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    max_ratio: float = MAX_KL_RATIO
    """Cap of the importance weight of the KL loss."""

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coefficient > 0 and self.kl != "k1"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coefficient > 0 and self.kl == "k1"

    @property
    def has_loss(self) -> bool:
        """Whether completions with zero advantage have a gradient."""
        return self.kl_in_loss or self.entropy_coefficient > 0

    def losses(self, tokens: LossTokens, entropies_N: Tensor) -> Tensor:
        """Token losses (N,), to be added to those of the policy loss.

        Tokens come from mu, so the KL is weighted by min(pi / mu, max_ratio), without gradient:
        below the cap, the mean under mu of the term of a token is that under pi. The entropy (Mnih
        et al. 2016, arXiv 1602.01783) is that of the full distribution at each position.
        """
        losses_N = torch.zeros_like(tokens.logprobs_N)
        if self.kl_in_loss:
            assert tokens.reference_logprobs_N is not None
            weights_N = tokens.log_ratios_N.detach().exp().clamp(max=self.max_ratio)
            kl_N = LOSSES[self.kl](tokens.logprobs_N, tokens.reference_logprobs_N)
            losses_N = losses_N + self.kl_coefficient * weights_N * kl_N
        if self.entropy_coefficient > 0:
            losses_N = losses_N - self.entropy_coefficient * entropies_N
        return losses_N


NO_REGULARIZATION = Regularization()


class ReferenceDivergence:
    """Means of k1 and k3 over the tokens of one optimiser update. They estimate KL(pi || ref)."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sums: Tensor | None = None  # (2,) float64

    def add(self, tokens: LossTokens) -> None:
        if tokens.reference_logprobs_N is None:
            return
        pair = tokens.logprobs_N.detach().double(), tokens.reference_logprobs_N.double()
        sums = torch.stack([k1(*pair).sum(), k3(*pair).sum()])
        self._num_tokens += len(tokens.logprobs_N)
        self._sums = sums if self._sums is None else self._sums + sums

    def metrics(self, gather: Callable[[Tensor], Tensor] = lambda x: x[None]) -> dict[str, float]:
        """Empty without a reference policy or tokens. `gather` as in `Diagnostics.metrics`."""
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        state = gather(torch.cat([sums, sums.new_tensor([self._num_tokens])])).sum(0)
        if state[2] == 0:
            return {}
        means = state[:2] / state[2]
        return {"reference_kl_k1": float(means[0]), "reference_kl_k3": float(means[1])}
