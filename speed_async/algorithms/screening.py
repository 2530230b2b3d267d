"""Selection of the completions that enter the gradient, given the bias of screening samples.

A group exists because its screening samples passed the gate. These samples are therefore not
distributed as the policy: conditioned on an open gate, rare successes are over-represented.

Shape legend: N completions of one group; the first `num_screening` are its screening samples.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from speed_async.config.sections.gate import GateConfig

Choice = Literal["all", "unbiased", "none"]


def kept(
    passed: NDArray[np.bool_], num_screening: int, gate: GateConfig, choice: Choice
) -> NDArray[np.bool_]:
    """Mask (N,) of the completions that enter the gradient. Dropped completions still contribute to
    baselines.

    `all` keeps every completion; `none` keeps only the continuation. `unbiased` drops the pivotal
    samples. Screening sample i is pivotal when flipping its outcome flips the gate decision
    low < k / num_screening < high (both strict, k passes among the screening samples).

    Proof of unbiasedness: given the other samples, the gate is open and i is kept either for both
    outcomes of i or for neither. A kept y_i is therefore distributed as under the policy, and its
    score-function estimate, with a baseline of the others, has the correct expectation. The gate
    uses only pass or fail, so this also holds for weighted, shaped and fractional rewards. `passed`
    must be what the gate counted, never a threshold on a weighted or shaped reward.

    Args: passed (N,), whether each completion passed (types.py).
    """
    kept_N = np.ones(len(passed), dtype=np.bool_)
    if choice == "none":
        kept_N[:num_screening] = False
    elif choice == "unbiased" and num_screening:
        screened = passed[:num_screening]
        num_passed = int(screened.sum())
        pivotal = [gate.is_pivotal(num_passed, num_screening, passed=own) for own in (False, True)]
        kept_N[:num_screening] = ~np.where(screened, pivotal[1], pivotal[0])
    return kept_N
