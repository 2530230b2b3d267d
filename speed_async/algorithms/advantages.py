"""Advantages: the reward of each completion relative to the other completions of the update.

Shape legend: N completions of one group. A list has one entry for each group of the update. Groups
may differ in size.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Advantages = Callable[[Sequence[Float64Array]], list[Float64Array]]

STD_FLOOR = 1e-4
"""Added to a standard deviation before the division, as in TRL."""


def rloo(rewards: Sequence[Float64Array]) -> list[Float64Array]:
    """Leave-one-out: A_i = r_i - mean of the other rewards of the group.

    The baseline of completion i does not depend on completion i. The gradient estimate therefore
    stays unbiased when other completions of the group come from other policy versions.
    Source: Ahmadian et al. 2024, "Back to Basics" (arXiv 2402.14740), equation 7; first in
    Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".

    Args: rewards (N,) of each group. Returns: advantages (N,) of each group, float64, exactly
    zero where all rewards of a group are equal.
    Raises ValueError for a group with fewer than two completions.
    """
    return [
        _subtract_baseline(rewards_N, _mean_of_others(rewards_N))
        for rewards_N in map(_validated, rewards)
    ]


def shrunken(rewards: Sequence[Float64Array], *, prior_weight: float) -> list[Float64Array]:
    """Leave-one-out, shrunken towards the other groups of the update: A_i = r_i - b_i with

        b_i = (m c + sum of the other rewards of the group) / (m + N - 1),

    where m is `prior_weight`, in completions, and c is the mean reward of all other groups. For
    pass or fail it is the posterior mean of the pass rate under a Beta prior of mean c and strength
    m. b_i does not depend on completion i, so the estimate stays unbiased as with `rloo`. A group
    of one completion has the baseline c. A group with equal rewards has a gradient, unless all
    rewards of the update are equal.
    Source: Zeng et al. 2025, "Shrinking the Variance: Shrinkage Baselines for Reinforcement
    Learning with Verifiable Rewards" (arXiv 2511.03710), leave-one-out at both levels; there, m is
    estimated in every update.

    Args: rewards (N,) of each group. Returns: advantages (N,) of each group, float64.
    Raises ValueError for an update of one group.
    """
    if len(rewards) < 2:
        raise ValueError("a shrunken baseline needs at least 2 groups in an update")
    rewards_all = np.concatenate(rewards).astype(np.float64)
    if (rewards_all == rewards_all[0]).all():
        return [np.zeros(len(rewards_N)) for rewards_N in rewards]
    results: list[Float64Array] = []
    for rewards_N in rewards:
        size, own = len(rewards_N), rewards_N.sum()
        others = (rewards_all.sum() - own) / (len(rewards_all) - size)
        baseline_N = (prior_weight * others + own - rewards_N) / (prior_weight + size - 1)
        results.append(rewards_N - baseline_N)
    return results


def grpo(rewards: Sequence[Float64Array]) -> list[Float64Array]:
    """A_i = (r_i - mean) / (std + 1e-4) over the group, with the sample standard deviation (n - 1).

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1.2; n - 1 and 1e-4 as
    in TRL. The division gives more weight to prompts that are almost always or almost never solved.

    Args, returns and errors as `rloo`.
    """
    return [
        _subtract_baseline(rewards_N, rewards_N.mean()) / (rewards_N.std(ddof=1) + STD_FLOOR)
        for rewards_N in map(_validated, rewards)
    ]


def dr_grpo(rewards: Sequence[Float64Array]) -> list[Float64Array]:
    """A_i = r_i - mean over the group: GRPO without the division.

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783), section 3.1.

    Args, returns and errors as `rloo`.
    """
    return [
        _subtract_baseline(rewards_N, rewards_N.mean()) for rewards_N in map(_validated, rewards)
    ]


def batch(rewards: Sequence[Float64Array]) -> list[Float64Array]:
    """A_i = (r_i - mean) / (std + 1e-4) over all completions of the update, std with n - 1.

    Source: Hu et al. 2025, "REINFORCE++" (arXiv 2501.03262), global advantage normalisation,
    without its KL term. Every group counts, including groups with equal rewards and groups of one
    completion. All advantages are zero when all rewards of the update are equal.

    Args: rewards (N,) of each group. Returns: advantages (N,) of each group, float64.
    Raises ValueError when the update has fewer than two completions.
    """
    sizes = [len(rewards_N) for rewards_N in rewards]
    rewards_all = np.concatenate(rewards).astype(np.float64)
    if len(rewards_all) < 2:
        raise ValueError("an update needs at least 2 completions to compare")
    if (rewards_all == rewards_all[0]).all():
        return [np.zeros(size) for size in sizes]
    normalised_all = (rewards_all - rewards_all.mean()) / (rewards_all.std(ddof=1) + STD_FLOOR)
    return np.split(normalised_all, np.cumsum(sizes)[:-1])


def _validated(rewards_N: Float64Array) -> Float64Array:
    if len(rewards_N) < 2:
        raise ValueError(
            f"an advantage needs at least 2 completions in a group, got {len(rewards_N)}: "
            "raise gate.n_init + gate.n_cont"
        )
    return np.asarray(rewards_N, dtype=np.float64)


def _mean_of_others(rewards_N: Float64Array) -> Float64Array:
    return (rewards_N.sum() - rewards_N) / (len(rewards_N) - 1)


def _subtract_baseline(
    rewards_N: Float64Array, baseline: Float64Array | np.float64
) -> Float64Array:
    """rewards_N - baseline, exactly zero for equal rewards, so that rounding errors do not become
    a training signal."""
    if (rewards_N == rewards_N[0]).all():
        return np.zeros_like(rewards_N)
    return rewards_N - baseline
