"""Reward shaping, applied to verifier rewards before advantages are computed.

Shape legend: N completions.
"""

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def soft_overlong_punishment(
    lengths: NDArray[np.int64], *, max_length: int, buffer: int, penalty: float = 1.0
) -> Float64Array:
    """Length penalty added to the reward: 0 up to max_length - buffer tokens, then a linear
    decrease to -penalty at max_length and beyond.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 13:
    ((Lmax - Lc) - L) / Lc between Lmax - Lc and Lmax.

    Args: lengths (N,) in tokens; max_length and buffer in tokens. A buffer of 0 disables it.
    Returns: (N,) in [-penalty, 0], float64.
    """
    if buffer == 0:
        return np.zeros(len(lengths))
    excess_N = np.clip(lengths - (max_length - buffer), 0, buffer)
    return -penalty * (excess_N / buffer)


def completion_limit(
    max_new_tokens: int, *, context_length: int | None, num_prompt_tokens: int = 0
) -> int:
    """Largest number of completion tokens after a prompt of `num_prompt_tokens`. `context_length`
    is None for a model without a context limit."""
    if context_length is None:
        return max_new_tokens
    return max(min(max_new_tokens, context_length - num_prompt_tokens), 1)


def overlong_buffer(share: float, max_length: int) -> int:
    """Number of tokens over which the penalty grows: share x max_length, rounded."""
    return round(share * max_length)
