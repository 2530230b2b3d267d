"""Aggregation of token losses: one constant weight per completion, so that
loss = sum of weight x token loss.

Weights are computed before completions are dropped and before micro-batches are formed. Every
denominator counts ALL completions of the update, including groups without signal, dropped screening
samples and empty completions. A denominator over kept completions only would depend on the
outcomes, which biases the gradient. It would also give batches with little signal as large a step
as batches with much signal.

Shape legend: N completions of one group. A list has one entry for each group of the update.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
Aggregation = Callable[[Sequence[IntArray]], list[Float64Array]]


def token_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / T, where T is the number of completion tokens of the update: all tokens weigh the same.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 12, over the whole update.

    Args: lengths (N,) of each group, in tokens. Returns: weights (N,) of each group.
    """
    weight = 1.0 / max(_num_tokens(lengths), 1)
    return [np.full(len(lengths_N), weight) for lengths_N in lengths]


def sequence_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / (C x length), where C is the number of completions: all completions weigh the same.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), equation 3. An empty completion
    counts in C and contributes no token. Args and returns as `token_mean`.
    """
    num_completions = _num_completions(lengths)
    return [1.0 / (num_completions * np.maximum(lengths_N, 1)) for lengths_N in lengths]


def prompt_mean(lengths: Sequence[IntArray]) -> list[Float64Array]:
    """1 / (P x T_p), with P prompts and T_p completion tokens of the prompt: the token mean within
    each prompt, then the mean over prompts. The number of completions of a prompt has no effect.

    Source: Khatri et al. 2025, "The Art of Scaling RL Compute" (ScaleRL, arXiv 2510.13786),
    prompt-level averaging. Args and returns as `token_mean`.
    """
    return [
        np.full(len(lengths_N), 1.0 / (len(lengths) * max(int(lengths_N.sum()), 1)))
        for lengths_N in lengths
    ]


def fixed_length(lengths: Sequence[IntArray], *, max_new_tokens: int) -> list[Float64Array]:
    """1 / (C x max_new_tokens), independent of the outcomes. `max_new_tokens` is the largest
    completion length of the run (`rewards.completion_limit`).

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO, arXiv 2503.20783),
    section 3.1. Args and returns as `token_mean`.
    """
    weight = 1.0 / (_num_completions(lengths) * max_new_tokens)
    return [np.full(len(lengths_N), weight) for lengths_N in lengths]


def _num_completions(lengths: Sequence[IntArray]) -> int:
    return sum(len(lengths_N) for lengths_N in lengths)


def _num_tokens(lengths: Sequence[IntArray]) -> int:
    return sum(int(lengths_N.sum()) for lengths_N in lengths)
