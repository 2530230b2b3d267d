"""Layout of rows in micro-batches, their division over the learner ranks, and their
log-probabilities without gradient.

All ranks have the same rows. With several ranks, the forward passes are collective operations: each
rank computes equally many micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from speed_async.config.sections.learner import LearnerConfig
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks
from speed_async.learner.parallel.shares import FILLER, Part, even_parts
from speed_async.learner.policy import Policy, check_policy, layout_cost
from speed_async.learner.rows import (
    TrainingRow,
    TrainingSample,
    lay_out,
    split_row,
    split_rows,
)
from speed_async.types import Float32Array

CPU_MICRO_BATCH_TOKENS = 1024
"""Larger micro-batches are no faster on a CPU and need more memory (measured with 30 M parameters:
512, 1024 and 2048 tokens take as long, with 0.3, 0.5 and 0.9 GB)."""

AddLogprobs = Callable[[TrainingSample, Float32Array], TrainingSample]


class MicroBatches:
    """Forms micro-batches for one model."""

    def __init__(
        self,
        policy: Policy,
        config: LearnerConfig,
        *,
        context_length: int | None,
        ranks: Ranks = ONE_RANK,
        device: torch.device | None = None,
    ) -> None:
        """`policy` is not sharded yet: rank 0 has its values. `device`: on which it will compute;
        None: where it is. Raises ModelError when the learner does not support the model, in rank 0.
        """
        can_share = ranks.rank == 0 and check_policy(policy, context_length)
        ranks.await_first("model checked")
        self._can_share_prompts = bool(ranks.merge(torch.tensor([int(can_share)])))
        self._cost = layout_cost(policy.causal_lm)
        self._ranks = ranks
        self._device = device or next(policy.parameters()).device
        self._max_tokens = config.micro_batch_tokens
        if self._device.type == "cpu":
            self._max_tokens = min(self._max_tokens, CPU_MICRO_BATCH_TOKENS)

    def of(self, group_rows: Sequence[TrainingRow], *, policy_version: int) -> list[MicroBatch]:
        """This rank's share of the completions of `group_rows`, which are one row per group."""
        own, num_missing = self._own(self._parts(group_rows))
        batches = [self._tensors(part, policy_version) for part in own]
        return batches + [replace(self._tensors([FILLER], policy_version), is_filler=True)] * (
            num_missing
        )

    def with_proximal(self, policy: Policy, group_rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """The rows with `proximal_logprobs` of the current policy."""
        return self._scored(
            policy, group_rows, lambda sample, values: replace(sample, proximal_logprobs=values)
        )

    def with_reference(
        self, reference: Policy, group_rows: Sequence[TrainingRow]
    ) -> list[TrainingRow]:
        """The rows with `reference_logprobs` of this policy."""
        return self._scored(
            reference, group_rows, lambda sample, values: replace(sample, reference_logprobs=values)
        )

    @torch.no_grad()
    def _scored(
        self, policy: Policy, group_rows: Sequence[TrainingRow], add: AddLogprobs
    ) -> list[TrainingRow]:
        parts = self._parts(group_rows)
        own, num_missing = self._own(parts)
        computed = {
            id(part): policy(self._tensors(part, policy_version=0))[0].cpu() for part in own
        }
        for _ in range(num_missing):
            policy(self._tensors([FILLER], policy_version=0))
        samples = [sample for part in parts for row in part for sample in row.samples]
        if not samples:
            return list(group_rows)
        lengths = [len(sample.token_ids) for sample in samples]
        logprobs_N = self._ranks.merge(
            torch.cat([computed.get(id(part), torch.zeros(_num_targets(part))) for part in parts])
        )
        values = np.split(logprobs_N.numpy(), np.cumsum(lengths)[:-1])
        found = {
            id(sample): add(sample, each) for sample, each in zip(samples, values, strict=True)
        }
        return [
            replace(row, samples=tuple(found[id(sample)] for sample in row.samples))
            for row in group_rows
        ]

    def _own(self, parts: Sequence[Part]) -> tuple[list[Part], int]:
        """This rank's share, and by how many it is smaller than the largest share."""
        rank, size = self._ranks.rank, self._ranks.size
        own = list(parts[rank::size])
        return own, -(-len(parts) // size) - len(own)

    def _parts(self, group_rows: Sequence[TrainingRow]) -> list[Part]:
        """The micro-batches of all ranks. Rows of single completions need no mask, so they are not
        mixed with others."""
        if self._can_share_prompts:
            rows = [part for row in group_rows for part in lay_out(row, self._cost)]
        else:
            rows = [part for row in group_rows for part in split_row(row, 1)]
        shared = [row for row in rows if len(row.samples) > 1]
        single = [row for row in rows if len(row.samples) == 1]
        parts = split_rows(shared, self._max_tokens) + split_rows(single, self._max_tokens)
        parts.sort(key=lambda part: len(part) * part[0].num_tokens, reverse=True)
        if self._ranks.size == 1:
            return parts
        return even_parts(parts, self._ranks.size, self._cost)

    def _tensors(self, rows: Sequence[TrainingRow], policy_version: int) -> MicroBatch:
        return make_micro_batch(rows, policy_version=policy_version).to(self._device)


def _num_targets(part: Part) -> int:
    return sum(len(sample.token_ids) for row in part for sample in row.samples)
