"""What passes between the parts of an objective, all over the tokens of one micro-batch.

    rewards -> advantages -> LossTokens -> correction -> Corrected -> policy loss -> TokenLosses
                                                                          x token weights -> loss

Shape legend: N completion tokens of one micro-batch, one after another; S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Ratios above e^20 are reported (and truncated) as e^20, so that no metric overflows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """What corrections and losses may use. Sequences are whole: none is split over two
    micro-batches."""

    logprobs_N: Tensor  # log pi_theta, with gradient
    behaviour_logprobs_N: Tensor  # log mu
    advantages_N: Tensor  # each sequence's advantage, repeated over its tokens
    ages_N: Tensor  # int64, versions between the one that sampled the token and pi_theta's; >= 0
    sequence_ids_N: Tensor  # int64 in [0, S)
    num_sequences: int

    @property
    def log_ratios_N(self) -> Tensor:
        """log rho = log pi_theta - log mu, with gradient."""
        return (self.logprobs_N - self.behaviour_logprobs_N).clamp(max=MAX_LOG_RATIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """What a correction decides. Nothing in it has a gradient.

    `anchor_logprobs_N` is the log-probability of the policy that a clipped loss takes its ratio
    to; `weights_N` multiplies each token's loss; `truncated_N` marks weights that were cut down,
    `masked_N` those set to 0.
    """

    anchor_logprobs_N: Tensor
    weights_N: Tensor
    truncated_N: Tensor  # bool
    masked_N: Tensor  # bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """`losses_N` with gradient (correction weight included, aggregation not); `clipped_N` marks
    tokens whose gradient the loss's own clipping removed or cut."""

    losses_N: Tensor
    clipped_N: Tensor  # bool


Correction = Callable[[LossTokens], Corrected]
PolicyLoss = Callable[[LossTokens, Corrected], TokenLosses]
