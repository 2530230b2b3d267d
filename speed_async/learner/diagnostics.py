"""What to watch while an update runs: how far the policy has moved from the one that sampled.

Shape legend: N completion tokens of one micro-batch.
"""

import torch
from torch import Tensor

from speed_async.learner.losses import LossTerms, LossTokens


class Diagnostics:
    """Running sums over the micro-batches of one update, kept on the device until `metrics`.

    They cover the tokens that were run: tokens of skipped zero-advantage groups are not in them.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sums: Tensor | None = None  # (7,) float64
        self._max_ratio: Tensor | None = None  # ()

    def add(self, tokens: LossTokens, terms: LossTerms, entropies_N: Tensor) -> None:
        log_ratios_N = tokens.log_ratios_N.detach().double()
        ratios_N = log_ratios_N.exp()
        sums = torch.stack(
            [
                terms.loss_sum.detach().double(),
                ratios_N.sum(),
                (ratios_N * ratios_N).sum(),
                terms.truncated_N.sum().double(),
                log_ratios_N.sum(),
                (ratios_N - 1.0 - log_ratios_N).sum(),
                entropies_N.detach().double().sum(),
            ]
        )
        self._num_tokens += len(log_ratios_N)
        self._sums = sums if self._sums is None else self._sums + sums
        largest = ratios_N.max()
        self._max_ratio = (
            largest if self._max_ratio is None else torch.maximum(self._max_ratio, largest)
        )

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`loss` is over `num_tokens` (the global divisor), the rest over the tokens added.

        kl_k1 = mean(-log rho) and kl_k3 = mean(rho - 1 - log rho) estimate KL(mu || pi_theta)
        (Schulman 2020, "Approximating KL Divergence"). effective_sample_size is
        (sum rho)^2 / (n * sum rho^2), a share in (0, 1] (Kong 1992). Without tokens, only `loss`.
        """
        if self._sums is None or self._max_ratio is None:
            return {"loss": 0.0}
        count = self._num_tokens
        loss, ratio, ratio_squared, truncated, log_ratio, k3, entropy = self._sums.tolist()
        return {
            "loss": loss / num_tokens,
            "ratio_mean": ratio / count,
            "ratio_max": float(self._max_ratio),
            "truncated_share": truncated / count,
            "kl_k1": -log_ratio / count,
            "kl_k3": k3 / count,
            "effective_sample_size": ratio * ratio / (count * ratio_squared or 1.0),
            "entropy": entropy / count,
        }
