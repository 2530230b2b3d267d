"""Off-policy corrections for tokens that were sampled by an older policy or by another engine.

A correction sets two values for every token: the anchor, which is the denominator of the ratio in a
clipped loss, and a weight on the token's loss. rho = pi_prox / mu, without gradient.

pi_prox is the policy at the start of the update. With one optimiser update per batch it equals
pi_theta. With several (`learner.passes`, `learner.minibatches`) and a loss with a ratio, pi_prox,
and thus rho, are fixed over the optimiser updates of the batch, and the ratio pi_theta / pi_prox of
the loss accounts for what they change. `policy_gradient` has no ratio: its rho is always
pi_theta / mu.

pi is the trained distribution at the sampling temperature over the full vocabulary. mu is the
behaviour policy, from which the token was sampled, at the same temperature and over the same
vocabulary, so that rho is 1 when the weights agree. The configuration therefore refuses nucleus
sampling in training: mu would be renormalised over a nucleus of mass Z >= top_p, rho would be Z
without any staleness, and clips and masks would act on tokens that no update has changed.

Shape legend: N concatenated completion tokens of one micro-batch; S sequences.
"""

import torch
from torch import Tensor

from speed_async.algorithms.loss_tokens import MAX_LOG_RATIO, Corrected, LossTokens


def none(tokens: LossTokens) -> Corrected:
    """Anchor mu, weight 1. A clipped loss uses the ratio to the behaviour policy; a loss without a
    ratio is not corrected.

    Source: Schulman et al. 2017, "PPO" (arXiv 1707.06347), equation 7, with pi_old = mu.
    """
    return _corrected(
        tokens, anchor_N=tokens.behaviour_logprobs_N, weights_N=torch.ones_like(_pi(tokens))
    )


def token_tis(tokens: LossTokens, *, max_ratio: float) -> Corrected:
    """Token-level truncated importance sampling: anchor pi_prox, weight min(rho, max_ratio).

    The estimate has bounded variance and is biased for tokens above the cap.
    Source: Ionides 2008, "Truncated Importance Sampling"; between engine and trainer: Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; IMPALA's
    clipped rho, Espeholt et al. 2018 (arXiv 1802.01561).

    With a clipped loss, this is decoupled PPO with pi_prox recomputed at the start of the update.
    Source: Hilton et al. 2021, "Batch Size-Invariance for Policy Optimization" (arXiv 2110.00641),
    the decoupled clipped objective; asynchronous: Fu et al. 2025, "AReaL" (arXiv 2505.24298).
    """
    return _truncated(tokens, _pi(tokens), _ratios(tokens), max_ratio)


def sequence_tis(tokens: LossTokens, *, max_ratio: float) -> Corrected:
    """As `token_tis`, with the ratio of the whole sequence, exp(sum of log rho), for each of its
    tokens. It is unbiased below the cap; its variance grows with the sequence length.

    Source: Liu et al. 2025, "When Speed Kills Stability" (sequence-level truncated importance
    sampling); the estimator is that of Ionides 2008.

    `objective.correction = "sequence_snis"` also divides the gradient of an optimiser update by the
    mean of these weights over its computed completions (self-normalised importance sampling). Those
    with zero advantage are not computed, so they are not in the mean, unlike in verl: a common
    factor of the update. Source: Owen 2013, "Monte Carlo theory, methods and examples", section
    9.2; verl's `rollout_is_batch_normalize`.
    """
    return _truncated(tokens, _pi(tokens), _sequence_ratios(tokens), max_ratio)


def geometric_tis(tokens: LossTokens, *, max_ratio: float) -> Corrected:
    """As `sequence_tis`, with the geometric mean of the ratios, rho_seq ** (1 / length). Its
    variance does not grow with the length; it is biased for sequences of several tokens.

    Source: Zheng et al. 2025, "GSPO" (arXiv 2507.18071), equation 7, as a weight.
    """
    return _truncated(tokens, _pi(tokens), _geometric_ratios(tokens), max_ratio)


def token_mask(tokens: LossTokens, *, min_ratio: float, max_ratio: float) -> Corrected:
    """Anchor pi_prox, weight rho where min_ratio <= rho <= max_ratio, else 0.

    Source: IcePop, Ling Team 2025, "Every Step Evolves" (arXiv 2510.18855).
    """
    return _masked(tokens, _ratios(tokens), min_ratio, max_ratio)


def sequence_mask(tokens: LossTokens, *, min_ratio: float, max_ratio: float) -> Corrected:
    """As `token_mask`, with the ratio of the whole sequence: all its tokens are kept or masked.

    Source: Liu et al. 2025, "When Speed Kills Stability" (sequence-level masked importance
    sampling).
    """
    return _masked(tokens, _sequence_ratios(tokens), min_ratio, max_ratio)


def geometric_mask(tokens: LossTokens, *, min_ratio: float, max_ratio: float) -> Corrected:
    """As `sequence_mask`, with the geometric mean of the ratios, rho_seq ** (1 / length). Unlike
    rho_seq, it does not move away from 1 with the length.

    Source: Liu et al. 2025, "When Speed Kills Stability", part 3, rejection by the geometric mean;
    verl's `seq_mean_k1`, which takes the weight of what it keeps from another level.
    """
    return _masked(tokens, _geometric_ratios(tokens), min_ratio, max_ratio)


def probability_mask(
    tokens: LossTokens, *, max_ratio: float, max_probability_change: float
) -> Corrected:
    """Anchor pi_prox, weight min(rho, max_ratio), and 0 for a token whose probability has already
    changed by more than max_probability_change in the direction of its gradient: pi_prox - mu at
    positive, mu - pi_prox at negative advantages. A rare token is not masked for its large ratio.

    Source: "Rethinking the Trust Region in LLM Reinforcement Learning" 2026 (DPPO, arXiv
    2602.04879), the mask by total variation, with the cap of section 5.4. prime-rl's default loss
    has the same mask, at 0.2, without a cap.
    """
    changes_N = _pi(tokens).exp() - tokens.behaviour_logprobs_N.exp()
    masked_N = tokens.advantages_N.sign() * changes_N > max_probability_change
    ratios_N = _ratios(tokens)
    return _corrected(
        tokens,
        anchor_N=_pi(tokens),
        weights_N=ratios_N.clamp(max=max_ratio).masked_fill(masked_N, 0.0),
        truncated_N=(ratios_N > max_ratio) & ~masked_N,
        masked_N=masked_N,
    )


def negative_sequence_mask(tokens: LossTokens, *, max_negative_kl: float) -> Corrected:
    """Anchor mu; weight 0 for sequences with negative advantage whose mean of log mu - log pi_theta
    exceeds max_negative_kl, otherwise 1. This masks failed sequences that the policy no longer
    samples, whose gradient would be unbounded.

    Source: DeepSeek-AI 2025, "DeepSeek-V3.2" (arXiv 2512.02556), section 3.1, "Off-Policy
    Sequence Masking".
    """
    kl_N = -sequence_means(tokens, tokens.log_ratios_N.detach())
    masked_N = (tokens.advantages_N < 0) & (kl_N > max_negative_kl)
    weights_N = torch.ones_like(kl_N).masked_fill(masked_N, 0.0)
    return _corrected(
        tokens, anchor_N=tokens.behaviour_logprobs_N, weights_N=weights_N, masked_N=masked_N
    )


def sequence_means(tokens: LossTokens, values_N: Tensor) -> Tensor:
    """Mean of `values_N` over the sequence of each token, (N,)."""
    lengths_S = _sequence_sums(tokens, torch.ones_like(values_N)).clamp(min=1)
    return (_sequence_sums(tokens, values_N) / lengths_S)[tokens.sequence_ids_N]


def _sequence_sums(tokens: LossTokens, values_N: Tensor) -> Tensor:
    sums_S = values_N.new_zeros(tokens.num_sequences)
    return sums_S.index_add(0, tokens.sequence_ids_N, values_N)


def _pi(tokens: LossTokens) -> Tensor:
    """log pi_prox."""
    return tokens.proximal_N


def _log_ratios(tokens: LossTokens) -> Tensor:
    return tokens.proximal_log_ratios_N


def _ratios(tokens: LossTokens) -> Tensor:
    return _log_ratios(tokens).exp()


def _sequence_ratios(tokens: LossTokens) -> Tensor:
    """exp(sum of log rho) over the sequence of each token, (N,)."""
    sums_S = _sequence_sums(tokens, _log_ratios(tokens))
    return sums_S.clamp(max=MAX_LOG_RATIO).exp()[tokens.sequence_ids_N]


def _geometric_ratios(tokens: LossTokens) -> Tensor:
    """exp(mean of log rho) over the sequence of each token, (N,)."""
    return sequence_means(tokens, _log_ratios(tokens)).exp()


def _truncated(
    tokens: LossTokens, anchor_N: Tensor, ratios_N: Tensor, max_ratio: float
) -> Corrected:
    return _corrected(
        tokens,
        anchor_N=anchor_N,
        weights_N=ratios_N.clamp(max=max_ratio),
        truncated_N=ratios_N > max_ratio,
    )


def _masked(tokens: LossTokens, ratios_N: Tensor, low: float, high: float) -> Corrected:
    masked_N = (ratios_N < low) | (ratios_N > high)
    return _corrected(
        tokens,
        anchor_N=_pi(tokens),
        weights_N=ratios_N.masked_fill(masked_N, 0.0),
        masked_N=masked_N,
    )


def _corrected(
    tokens: LossTokens,
    *,
    anchor_N: Tensor,
    weights_N: Tensor,
    truncated_N: Tensor | None = None,
    masked_N: Tensor | None = None,
) -> Corrected:
    no_tokens_N = torch.zeros_like(tokens.logprobs_N, dtype=torch.bool)
    return Corrected(
        anchor_logprobs_N=anchor_N,
        weights_N=weights_N,
        truncated_N=no_tokens_N if truncated_N is None else truncated_N,
        masked_N=no_tokens_N if masked_N is None else masked_N,
    )
