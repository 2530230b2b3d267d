"""Division of micro-batches over the learner ranks.

In every step, each rank computes one micro-batch, and all ranks wait for the longest, because they
gather the layers together. So the micro-batches of one step have similar costs.
"""

from collections.abc import Sequence

import numpy as np

from speed_async.learner.rows import LayoutCost, TrainingRow, TrainingSample, make_row

FILLER = make_row(
    np.zeros(1, np.int32),
    [
        TrainingSample(
            token_ids=np.zeros(1, np.int32),
            logprobs=np.zeros(1, np.float32),
            policy_versions=np.zeros(1, np.int32),
            advantage=0.0,
            weight=0.0,
        )
    ],
)
"""The only row of a micro-batch that contributes nothing."""

Part = list[TrainingRow]


def even_parts(parts: Sequence[Part], num_ranks: int, cost: LayoutCost) -> list[Part]:
    """The parts in descending order of cost; rank r takes every `num_ranks`-th, from the r-th.

    The costliest parts are split until each rank has equally many, or all parts are single rows.
    """

    def cost_of(part: Part) -> float:
        return cost.of([max(row.num_tokens for row in part)] * len(part))

    even = sorted(parts, key=cost_of, reverse=True)
    while len(even) % num_ranks:
        index = next((i for i, part in enumerate(even) if len(part) > 1), None)
        if index is None:
            break
        part = even.pop(index)
        even += [part[: len(part) // 2], part[len(part) // 2 :]]
        even.sort(key=cost_of, reverse=True)
    return even
