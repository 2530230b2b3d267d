"""The reference policy of the KL divergence: a frozen copy of the start model.

It is loaded from `model.path` in every attempt, so a resumed run has the same reference. It has the
dtype of the learner (float32) and the sampling temperature. With adapters, it is the policy without
them: it takes no memory, and has the dtype of the frozen weights.

Shape legend: N completions of one group.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.learner.micro_batches import MicroBatches
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks
from speed_async.learner.parallel.sharding import load_for_rank
from speed_async.learner.policy import Policy
from speed_async.learner.rows import TrainingRow, training_row
from speed_async.types import Group

Float64Array = NDArray[np.float64]


def load_reference(config: Config, ranks: Ranks = ONE_RANK) -> Policy:
    """Not sharded yet. Raises ModelError when the start model is missing or unreadable."""
    model = load_for_rank(
        model_folder(config.model.path),
        ranks,
        device=config.learner.device,
        activation_checkpointing="none",
    )
    model.requires_grad_(False)
    ranks.await_first("reference loaded")
    return Policy(model, temperature=config.actors.temperature)


class Reference:
    def __init__(
        self,
        policy: Policy,
        micro_batches: MicroBatches,
        *,
        scope: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`policy` is the reference within `scope`."""
        self.policy = policy
        self._micro_batches = micro_batches
        self._scope = scope

    def score(self, group_rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """The rows with the log-probabilities of the reference, which all optimiser updates of the
        batch share."""
        with self._scope():
            return self._micro_batches.with_reference(self.policy, group_rows)

    def sequence_k1(self, current: Policy, groups: Sequence[Group]) -> list[Float64Array]:
        """Sum over the tokens of each completion of log pi - log ref (N,), for each group, with pi
        the current policy. 0 for an empty completion."""
        rows = [
            training_row(
                group,
                advantages_N=np.zeros(len(group.completions)),
                weights_N=np.zeros(len(group.completions)),
                kept_N=np.ones(len(group.completions), np.bool_),
                with_zero_advantage=True,
            )
            for group in groups
        ]
        rows = self._micro_batches.with_proximal(current, self.score(rows))
        sums = [np.zeros(len(group.completions)) for group in groups]
        for row, sums_N in zip(rows, sums, strict=True):
            for sample in row.samples:
                assert sample.proximal_logprobs is not None
                assert sample.reference_logprobs is not None
                x_T = sample.proximal_logprobs.astype(np.float64) - sample.reference_logprobs
                sums_N[sample.index] = x_T.sum()
        return sums
