"""Metrics of an update: divergence from the behaviour policy and composition of the batch.

Shape legend: N completion tokens of one micro-batch; in `GroupSignal`, completions of one group.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from speed_async.algorithms.loss_tokens import Corrected, LossTokens, TokenLosses
from speed_async.algorithms.objective import GroupSignal
from speed_async.types import Group

NUM_BINS = 10
NUM_SUMS, NUM_MAXIMA = 13, 2


class Diagnostics:
    """Running sums over the micro-batches of one update, kept on the device until `metrics`.

    The sums exclude tokens of dropped completions and of completions with zero advantage, which
    are not computed.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_sequences = 0
        self._sums: Tensor | None = None  # (NUM_SUMS - 2,) float64
        self._maxima: Tensor | None = None  # (NUM_MAXIMA,) float64

    def add(
        self,
        tokens: LossTokens,
        corrected: Corrected,
        losses: TokenLosses,
        *,
        loss: Tensor,
        entropies_N: Tensor,
    ) -> None:
        """Accumulate one micro-batch, before its backward pass. `loss` () is its contribution to
        the loss of the update."""
        log_ratios_N = tokens.log_ratios_N.detach().double()
        ratios_N = log_ratios_N.exp()
        sums = torch.stack(
            [
                loss.detach().double(),
                ratios_N.sum(),
                (ratios_N * ratios_N).sum(),
                losses.clipped_N.sum().double(),
                _num_dual_clipped(losses),
                corrected.truncated_N.sum().double(),
                corrected.masked_N.sum().double(),
                log_ratios_N.sum(),
                (ratios_N - 1.0 - log_ratios_N).sum(),
                entropies_N.detach().double().sum(),
                _sum_of_sequence_means(tokens, corrected.weights_N.double()),
            ]
        )
        self._num_tokens += len(log_ratios_N)
        self._num_sequences += tokens.num_sequences
        self._sums = sums if self._sums is None else self._sums + sums
        maxima = torch.stack([ratios_N.max(), token_weights(tokens, losses).max()])
        self._maxima = maxima if self._maxima is None else torch.maximum(self._maxima, maxima)

    def metrics(self, gather: Callable[[Tensor], Tensor] = lambda x: x[None]) -> dict[str, float]:
        """`gather` returns the values of all ranks (R, ...) given those of this rank.

        `loss` is the sum over micro-batches; all other metrics are over the accumulated tokens.
        Ratios are taken before truncation. weight_mean is the mean, over completions in the sums,
        of the mean correction weight of their tokens. token_weight_max is the largest weight of
        one token in the gradient (`token_weights`).

        kl_k1 = mean(-log rho) and kl_k3 = mean(rho - 1 - log rho) estimate KL(mu || pi_theta)
        (Schulman 2020, "Approximating KL Divergence"). effective_sample_size is
        (sum rho)^2 / (n * sum rho^2), a fraction in (0, 1] (Kong 1992). Without tokens, the result
        contains only `loss`.
        """
        state_R = gather(self._state())
        (
            count,
            num_sequences,
            loss,
            ratio,
            ratio_squared,
            clipped,
            dual_clipped,
            truncated,
            masked,
            log_ratio,
            k3,
            entropy,
            weight,
        ) = state_R[:, :NUM_SUMS].sum(0).numpy().tolist()
        if count == 0:
            return {"loss": 0.0}
        ratio_max, token_weight_max = state_R[:, NUM_SUMS:].amax(0).numpy().tolist()
        return {
            "loss": loss,
            "ratio_mean": ratio / count,
            "ratio_max": ratio_max,
            "weight_mean": weight / num_sequences,
            "token_weight_max": token_weight_max,
            "clipped_share": clipped / count,
            "dual_clipped_share": dual_clipped / count,
            "truncated_share": truncated / count,
            "masked_share": masked / count,
            "kl_k1": -log_ratio / count,
            "kl_k3": k3 / count,
            "effective_sample_size": ratio * ratio / (count * ratio_squared or 1.0),
            "entropy": entropy / count,
        }

    def _state(self) -> Tensor:
        """Counts, sums and maxima of this rank, (NUM_SUMS + NUM_MAXIMA,) float64 on the CPU."""
        if self._sums is None or self._maxima is None:
            state = torch.zeros(NUM_SUMS + NUM_MAXIMA, dtype=torch.float64)
            state[NUM_SUMS:] = float("-inf")
            return state
        counts = torch.tensor([self._num_tokens, self._num_sequences], dtype=torch.float64)
        return torch.cat([counts, torch.cat([self._sums, self._maxima]).cpu()])


def token_weights(tokens: LossTokens, losses: TokenLosses) -> Tensor:
    """Weight of each token in the gradient, (N,) float64: |d loss / d log pi|, with advantage and
    correction, without the weight of the aggregation."""
    (gradient_N,) = torch.autograd.grad(losses.losses_N.sum(), tokens.logprobs_N, retain_graph=True)
    return gradient_N.detach().abs().double()


def _sum_of_sequence_means(tokens: LossTokens, values_N: Tensor) -> Tensor:
    lengths_S = torch.bincount(tokens.sequence_ids_N, minlength=tokens.num_sequences)
    return (values_N / lengths_S[tokens.sequence_ids_N]).sum()


def _num_dual_clipped(losses: TokenLosses) -> Tensor:
    dual_N = losses.dual_clipped_N
    if dual_N is None:
        return losses.losses_N.new_zeros((), dtype=torch.float64)
    return dual_N.sum().double()


def batch_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics that depend on the batch only, from raw rewards.

    A zero-signal group is a group whose rewards are all equal. `cut_completions` counts completions
    that reached the length limit, `cut_passed` those of them that passed.
    """
    completions = [c for group in groups for c in group.completions]
    num_zero_signal = sum(len({c.reward for c in group.completions}) == 1 for group in groups)
    metrics = {
        "trained_reward_mean": float(np.mean([c.reward for c in completions])),
        "pass_rate_mean": float(np.mean([group.pass_rate for group in groups])),
        "zero_signal_groups": float(num_zero_signal),
        "zero_signal_share": num_zero_signal / len(groups),
        "completion_tokens_mean": float(np.mean([c.num_tokens for c in completions])),
        "empty_completions": float(sum(c.num_tokens == 0 for c in completions)),
        "cut_completions": float(sum(c.is_truncated for c in completions)),
        "cut_passed": float(sum(c.is_truncated and c.passed for c in completions)),
    }
    return metrics | pass_rate_histogram(groups)


def pass_rate_histogram(groups: Sequence[Group]) -> dict[str, float]:
    """Number of groups per pass-rate bin: 0, ten bins of width 0.1 (lower edge included) and 1.

    Keys: `pass_rate_histogram/0`, `/0.0-0.1` (above 0) ... `/0.9-1.0` (below 1), `/1`.
    """
    bins = ["0", *(f"{k / NUM_BINS:.1f}-{(k + 1) / NUM_BINS:.1f}" for k in range(NUM_BINS)), "1"]
    counts = dict.fromkeys((f"pass_rate_histogram/{name}" for name in bins), 0.0)
    for group in groups:
        num_passed, num_completions = group.num_passed, len(group.completions)
        name = bins[1 + NUM_BINS * num_passed // num_completions] if num_passed else bins[0]
        counts[f"pass_rate_histogram/{name}"] += 1.0
    return counts


def screening_metrics(groups: Sequence[Group], signals: Sequence[GroupSignal]) -> dict[str, float]:
    """`pivotal_share`: fraction of the screening samples excluded from the gradient; absent when
    there are no screening samples."""
    num_screening = sum(group.num_screening for group in groups)
    if num_screening == 0:
        return {}
    num_dropped = sum(int((~signal.kept_N).sum()) for signal in signals)
    return {"pivotal_share": num_dropped / num_screening}


def shaping_metrics(signals: Sequence[GroupSignal]) -> dict[str, float]:
    """`reward/overlong`: mean of the overlong penalty over the completions, at most 0."""
    return {"reward/overlong": float(np.mean(np.concatenate([s.shaping_N for s in signals])))}
