"""Token-level policy losses, before aggregation.

Every loss has the signature `PolicyLoss`. It computes the ratio to the anchor of the correction and
multiplies by the correction's weight. A token with zero advantage contributes nothing.

Shape legend: N concatenated completion tokens of one micro-batch; S sequences.
"""

import torch
from torch import Tensor

from speed_async.algorithms.corrections import sequence_means
from speed_async.algorithms.loss_tokens import MAX_LOG_RATIO, Corrected, LossTokens, TokenLosses


def policy_gradient(tokens: LossTokens, corrected: Corrected) -> TokenLosses:
    """-weight A log pi. It has no ratio and does not use the anchor.

    Source: Williams 1992, "REINFORCE".
    """
    return TokenLosses(
        losses_N=-corrected.weights_N * tokens.advantages_N * tokens.logprobs_N,
        clipped_N=torch.zeros_like(tokens.logprobs_N, dtype=torch.bool),
    )


def ppo_clip(
    tokens: LossTokens,
    corrected: Corrected,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> TokenLosses:
    """-weight G, G = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / anchor; for A < 0,
    G = max(min(...), dual_clip A). The gradient of a token with negative advantage thus ends at
    r = dual_clip. Without that, one token that has become likely outweighs all others.

    Source: Schulman et al. 2017, "PPO" (arXiv 1707.06347), equation 7; two bounds: Yu et al. 2025,
    "DAPO" (arXiv 2503.14476), equation 10; dual clip: Ye et al. 2020, "Mastering Complex Control in
    MOBA Games" (arXiv 1912.09729), equation 5.
    """
    ratios_N = _log_ratios(tokens, corrected).exp()
    return _clipped(tokens, corrected, ratios_N, clip_low, clip_high, dual_clip)


def cispo(tokens: LossTokens, corrected: Corrected, *, clip_high: float) -> TokenLosses:
    """-weight sg[min(r, 1 + clip_high)] A log pi, r = pi / anchor. The ratio is clipped; the token
    keeps its gradient. TRL's `epsilon_high` equals 1 + clip_high.

    Source: MiniMax 2025, "MiniMax-M1" (arXiv 2506.13585), equations 4 and 5, without a lower bound.
    """
    ratios_N = _log_ratios(tokens, corrected).detach().exp()
    factors_N = corrected.weights_N * ratios_N.clamp(max=1.0 + clip_high) * tokens.advantages_N
    return TokenLosses(
        losses_N=-factors_N * tokens.logprobs_N,
        clipped_N=ratios_N > 1.0 + clip_high,
    )


def gspo(
    tokens: LossTokens,
    corrected: Corrected,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> TokenLosses:
    """`ppo_clip` with the sequence-level ratio s = exp(mean of log r) on each token,
    s_t = sg[s] pi / sg[pi].

    Source: Zheng et al. 2025, "GSPO" (arXiv 2507.18071), equation 7, and equation 14 for the
    token-level form (the gradients are equal because A is constant within a sequence). The dual
    clip is an addition: the mean over a sequence of a few tokens is as unbounded as r.
    """
    log_s_N = sequence_means(tokens, _log_ratios(tokens, corrected).detach())
    ratios_N = (log_s_N + tokens.logprobs_N - tokens.logprobs_N.detach()).exp()
    return _clipped(tokens, corrected, ratios_N, clip_low, clip_high, dual_clip)


def _log_ratios(tokens: LossTokens, corrected: Corrected) -> Tensor:
    """log r = log pi - log anchor, with gradient."""
    return (tokens.logprobs_N - corrected.anchor_logprobs_N).clamp(max=MAX_LOG_RATIO)


def _clipped(
    tokens: LossTokens,
    corrected: Corrected,
    ratios_N: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> TokenLosses:
    advantages_N, low, high = tokens.advantages_N, 1.0 - clip_low, 1.0 + clip_high
    gains_N = torch.minimum(ratios_N * advantages_N, ratios_N.clamp(low, high) * advantages_N)
    too_high_N = (advantages_N > 0) & (ratios_N.detach() > high)
    too_low_N = (advantages_N < 0) & (ratios_N.detach() < low)
    dual_N = (advantages_N < 0) & (ratios_N.detach() > dual_clip)
    gains_N = torch.where(dual_N, dual_clip * advantages_N, gains_N)
    return TokenLosses(
        losses_N=-corrected.weights_N * gains_N,
        clipped_N=too_high_N | too_low_N,
        dual_clipped_N=dual_N,
    )
