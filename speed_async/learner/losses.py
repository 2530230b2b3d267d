"""Policy-gradient losses with off-policy correction.

Every loss is one function of one signature (`PolicyLoss`): it sees the completion tokens of one
micro-batch and returns a SUM over them. The trainer divides by the completion tokens of the whole
update (token-mean over the global batch, as DAPO does), so how an update is cut into
micro-batches, and which zero-advantage groups were left out, cannot change its gradient.

pi is the distribution under training at the sampling temperature over the full vocabulary; mu is
the one the token was drawn from. With top_p = 1 both are normalised over the same set and
rho = pi / mu has mean 1 under mu when the weights agree. With top_p < 1 mu is renormalised over
the nucleus, whose mass Z lies in [top_p, 1]: rho is then (pi / pi_mu) * Z for tokens in the
nucleus, so it is too small by the factor Z, and tokens outside it are never seen. The gradient is
that of the full-vocabulary policy restricted to the nuclei, shrunk by at most 1 - top_p.

Shape legend: N completion tokens of one micro-batch, one after another; S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Ratios above e^20 are reported (and truncated) as e^20, so that no metric overflows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """What a loss may use. Sequences are whole: none is split over two micro-batches."""

    logprobs_N: Tensor  # log pi_theta, with gradient
    behaviour_logprobs_N: Tensor  # log mu
    advantages_N: Tensor  # each sequence's advantage, repeated over its tokens
    sequence_ids_N: Tensor  # int64 in [0, S)
    num_sequences: int

    @property
    def log_ratios_N(self) -> Tensor:
        """log rho = log pi - log mu, with gradient."""
        return (self.logprobs_N - self.behaviour_logprobs_N).clamp(max=MAX_LOG_RATIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """`loss_sum` is a scalar with gradient; `truncated_N` marks tokens whose ratio was cut."""

    loss_sum: Tensor  # ()
    truncated_N: Tensor  # bool


PolicyLoss = Callable[[LossTokens], LossTerms]


def truncated_importance_sampling(tokens: LossTokens, *, max_ratio: float) -> LossTerms:
    """Token-level truncated importance sampling: -sum of min(rho, cap).detach() * A * log pi.

    The gradient is that of the off-policy policy gradient with its weights cut at the cap: biased
    for tokens above it, with bounded variance. A token with zero advantage adds nothing.
    Source: Ionides 2008, "Truncated Importance Sampling"; as a token-level correction between
    engine and trainer: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; IMPALA's clipped rho, Espeholt et al. 2018 (arXiv 1802.01561).
    """
    ratios_N = tokens.log_ratios_N.detach().exp()
    weights_N = ratios_N.clamp(max=max_ratio) * tokens.advantages_N
    return LossTerms(
        loss_sum=-(weights_N * tokens.logprobs_N).sum(),
        truncated_N=ratios_N > max_ratio,
    )
