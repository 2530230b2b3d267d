"""How good each completion of a group was, compared with its siblings.

Shape legend: N completions of one group.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def rloo(rewards: Sequence[float] | NDArray[np.floating]) -> Float64Array:
    """Leave-one-out advantages of one group: A_i = r_i - mean of the other rewards.

    The baseline of completion i does not depend on completion i, so the gradient estimate stays
    unbiased even when siblings were sampled under other policy versions.
    Source: Ahmadian et al. 2024, "Back to Basics" (arXiv 2402.14740), equation 7; first in
    Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".

    Args: rewards (N,). Returns: advantages (N,), float64, exactly zero when all rewards are equal.
    Raises ValueError for fewer than two rewards: there is no other to compare with.
    """
    rewards_N = np.asarray(rewards, dtype=np.float64)
    num_completions = rewards_N.size
    if num_completions < 2:
        raise ValueError(
            f"RLOO needs at least 2 completions in a group, got {num_completions}: "
            "raise gate.n_init + gate.n_cont"
        )
    if (rewards_N == rewards_N[0]).all():  # a rounding residue would pass for a training signal
        return np.zeros_like(rewards_N)
    others_mean_N = (rewards_N.sum() - rewards_N) / (num_completions - 1)
    return rewards_N - others_mean_N
