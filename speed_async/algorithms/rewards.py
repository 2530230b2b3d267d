"""What a verifier's reward becomes before advantages are taken.

Shape legend: N completions.
"""

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def soft_overlong_punishment(
    lengths: NDArray[np.int64], *, max_length: int, buffer: int, penalty: float = 1.0
) -> Float64Array:
    """What is added to a reward for its completion's length: 0 up to max_length - buffer tokens,
    then falling linearly, -penalty at max_length and past it.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 13:
    ((Lmax - Lc) - L) / Lc between Lmax - Lc and Lmax.

    Args: lengths (N,) in tokens; max_length, buffer in tokens, buffer 0 is off.
    Returns: (N,) in [-penalty, 0], float64.
    """
    if buffer == 0:
        return np.zeros(len(lengths))
    excess_N = np.clip(lengths - (max_length - buffer), 0, buffer)
    return -penalty * (excess_N / buffer)


def completion_limit(
    max_new_tokens: int, *, context_length: int | None, num_prompt_tokens: int = 0
) -> int:
    """Tokens at which a completion after this prompt is cut. `context_length` None: the model has
    no limit of its own."""
    if context_length is None:
        return max_new_tokens
    return max(min(max_new_tokens, context_length - num_prompt_tokens), 1)


def overlong_buffer(share: float, max_length: int) -> int:
    """Tokens over which the punishment grows: the nearest whole number to share x max_length."""
    return round(share * max_length)
