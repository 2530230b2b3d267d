"""Layout of rows in micro-batches, and their log-probabilities without gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from speed_async.config.sections.learner import LearnerConfig
from speed_async.learner.batch import MicroBatch, make_micro_batch
from speed_async.learner.policy import Policy, check_policy, layout_cost
from speed_async.learner.rows import (
    TrainingRow,
    TrainingSample,
    choose_width,
    split_row,
    split_rows,
)
from speed_async.types import Float32Array

CPU_MICRO_BATCH_TOKENS = 2048
"""Larger micro-batches exceed the cache of a CPU core and cost more per token (measured)."""

AddLogprobs = Callable[[TrainingSample, Float32Array], TrainingSample]


class MicroBatches:
    """Forms micro-batches for one model."""

    def __init__(
        self, policy: Policy, config: LearnerConfig, *, context_length: int | None
    ) -> None:
        """Raises ModelError when the learner does not support the model."""
        self._can_share_prompts = check_policy(policy, context_length)
        self._cost = layout_cost(policy.causal_lm)
        self._device = next(policy.parameters()).device
        self._max_tokens = config.micro_batch_tokens
        if self._device.type == "cpu":
            self._max_tokens = min(self._max_tokens, CPU_MICRO_BATCH_TOKENS)

    def of(self, group_rows: Sequence[TrainingRow], *, policy_version: int) -> list[MicroBatch]:
        """All completions of `group_rows`, which are one row per group."""
        return [self._tensors(part, policy_version) for part in self._parts(group_rows)]

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
        found = {}
        for part in self._parts(group_rows):
            logprobs_N, _ = policy(self._tensors(part, policy_version=0))
            samples = [sample for row in part for sample in row.samples]
            ends = np.cumsum([len(sample.token_ids) for sample in samples])[:-1]
            for sample, values in zip(
                samples, np.split(logprobs_N.cpu().numpy(), ends), strict=True
            ):
                found[id(sample)] = add(sample, values)
        return [
            replace(row, samples=tuple(found[id(sample)] for sample in row.samples))
            for row in group_rows
        ]

    def _parts(self, group_rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        width = choose_width(group_rows, self._cost) if self._can_share_prompts else 1
        rows = list(chain.from_iterable(split_row(row, width) for row in group_rows))
        return split_rows(rows, self._max_tokens)

    def _tensors(self, rows: Sequence[TrainingRow], policy_version: int) -> MicroBatch:
        return make_micro_batch(rows, policy_version=policy_version).to(self._device)
