"""How token losses add up to the loss of an update: one constant weight for each completion's
tokens, so that loss = sum of weight x token loss.

The weights are set before anything is left out or cut into micro-batches, and every denominator
counts ALL completions of the update: also groups without signal, dropped screening samples and
empty completions. Were only what is kept counted, the divisor would depend on the outcomes it
divides, and the gradient would be biased (and a batch that taught little would step as far as one
that taught much).

Shape legend: N completions of one group. A list has one entry for each group of the update.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
Aggregation = Callable[[Sequence[IntArray]], list[Float64Array]]


def token_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / T, T the completion tokens of the update: each token counts the same.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 12, over the whole update.

    Args: lengths (N,) of each group, in tokens. Returns: weights (N,) of each group.
    """
    weight = 1.0 / max(_num_tokens(lengths), 1)
    return [np.full(len(lengths_N), weight) for lengths_N in lengths]


def sequence_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / (C x length), C the completions of the update: each completion counts the same.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), equation 3. An empty completion
    counts in C and has no token to weigh. Args and returns as `token_mean`.
    """
    num_completions = _num_completions(lengths)
    return [1.0 / (num_completions * np.maximum(lengths_N, 1)) for lengths_N in lengths]


def prompt_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / (P x T_p), P prompts, T_p the tokens of this prompt's completions: the token-mean inside
    each prompt, then the mean over prompts. A prompt counts once, however many completions it has.

    Source: Khatri et al. 2025, "The Art of Scaling RL Compute" (ScaleRL, arXiv 2510.13786),
    prompt-level averaging. Args and returns as `token_mean`.
    """
    return [
        np.full(len(lengths_N), 1.0 / (len(lengths) * max(int(lengths_N.sum()), 1)))
        for lengths_N in lengths
    ]


def fixed_length(lengths: Sequence[IntArray], *, max_new_tokens: int) -> list[Float64Array]:
    """1 / (C x max_new_tokens): a constant that no outcome moves. `max_new_tokens` is the most that
    any completion of the run can have (`rewards.completion_limit`).

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO, arXiv 2503.20783),
    section 3.1. Args and returns as `token_mean`.
    """
    weight = 1.0 / (_num_completions(lengths) * max_new_tokens)
    return [np.full(len(lengths_N), weight) for lengths_N in lengths]


def _num_completions(lengths: Sequence[IntArray]) -> int:
    return sum(len(lengths_N) for lengths_N in lengths)


def _num_tokens(lengths: Sequence[IntArray]) -> int:
    return sum(int(lengths_N.sum()) for lengths_N in lengths)
