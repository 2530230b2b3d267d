"""Which completions enter the gradient: what to do about samples that the gate has looked at.

A group exists because its screening samples passed the gate, so they are not draws from the
policy: given that the gate opened, a rare success is over-represented among them.

Shape legend: N completions of one group, the first `num_screening` of which the gate looked at.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from speed_async.config.schema import GateConfig

Choice = Literal["all", "unbiased", "none"]


def kept(
    passed: NDArray[np.bool_], num_screening: int, gate: GateConfig, choice: Choice
) -> NDArray[np.bool_]:
    """Marks (N,) of the completions that enter the gradient; dropped ones still serve in baselines.

    `all` keeps everything, `none` keeps what was continued. `unbiased` drops the pivotal samples:
    screening sample i is pivotal when flipping its pass would flip the gate's decision,
    low < k / num_screening < high (both strict, k passes among the screening samples).

    Why that is unbiased: given the other samples, the gate is open and i is kept either for both
    outcomes of i or for neither, so the kept y_i is distributed as the policy sampled it, and the
    score-function estimate over it, with a baseline of the others, has the right expectation.
    The gate sees only pass or fail, so this holds for shaped and fractional rewards as well:
    `passed` must come from the raw reward (the one the gate saw), never from the shaped one.

    Args: passed (N,), whether each completion's raw reward reached PASS_REWARD.
    """
    kept_N = np.ones(len(passed), dtype=np.bool_)
    if choice == "none":
        kept_N[:num_screening] = False
    elif choice == "unbiased":
        screened = passed[:num_screening]
        num_passed = int(screened.sum())
        is_open = _opens(num_passed, num_screening, gate)
        pivotal_if_passed = _opens(num_passed - 1, num_screening, gate) != is_open
        pivotal_if_failed = _opens(num_passed + 1, num_screening, gate) != is_open
        kept_N[:num_screening] = ~np.where(screened, pivotal_if_passed, pivotal_if_failed)
    return kept_N


def _opens(num_passed: int, num_screening: int, gate: GateConfig) -> bool:
    """The gate's decision on this many passes (algorithms/gate.py makes the same one)."""
    return gate.low < num_passed / max(num_screening, 1) < gate.high
