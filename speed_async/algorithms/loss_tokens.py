"""Data types passed between the parts of an objective, over the tokens of one micro-batch.

    rewards -> advantages -> LossTokens -> correction -> Corrected -> policy loss -> TokenLosses
                                                                          x token weights -> loss

Shape legend: N concatenated completion tokens of one micro-batch; S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Ratios above e^20 are reported and truncated as e^20, so that no metric overflows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """Inputs of corrections and losses. A sequence is never split across micro-batches."""

    logprobs_N: Tensor  # log pi_theta, with gradient
    behaviour_logprobs_N: Tensor  # log mu
    advantages_N: Tensor  # each sequence's advantage, repeated over its tokens
    ages_N: Tensor  # int64, staleness of the token: versions behind pi_theta, >= 0
    sequence_ids_N: Tensor  # int64 in [0, S)
    num_sequences: int
    proximal_logprobs_N: Tensor | None = None
    """log pi_prox, without gradient; None: pi_prox is the current pi_theta."""
    reference_logprobs_N: Tensor | None = None
    """Log-probabilities under the reference policy of the KL term, if there is one."""

    @property
    def log_ratios_N(self) -> Tensor:
        """log rho = log pi_theta - log mu, with gradient."""
        return (self.logprobs_N - self.behaviour_logprobs_N).clamp(max=MAX_LOG_RATIO)

    @property
    def proximal_N(self) -> Tensor:
        """log pi_prox, without gradient."""
        if self.proximal_logprobs_N is None:
            return self.logprobs_N.detach()
        return self.proximal_logprobs_N

    @property
    def proximal_log_ratios_N(self) -> Tensor:
        """log pi_prox - log mu, without gradient."""
        return (self.proximal_N - self.behaviour_logprobs_N).clamp(max=MAX_LOG_RATIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """Output of a correction. No tensor has a gradient.

    `anchor_logprobs_N` are log-probabilities under the anchor, the denominator of the ratio in a
    clipped loss. `weights_N` multiplies each token's loss. `truncated_N` marks truncated weights,
    `masked_N` weights set to 0.
    """

    anchor_logprobs_N: Tensor
    weights_N: Tensor
    truncated_N: Tensor  # bool
    masked_N: Tensor  # bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """`losses_N` with gradient; it includes the correction weight and excludes the aggregation
    weight. `clipped_N` marks tokens whose gradient the loss clips to zero or truncates,
    `dual_clipped_N` those with negative advantage that the dual clip takes out; None without one.
    """

    losses_N: Tensor
    clipped_N: Tensor  # bool
    dual_clipped_N: Tensor | None = None  # bool


Correction = Callable[[LossTokens], Corrected]
PolicyLoss = Callable[[LossTokens, Corrected], TokenLosses]
