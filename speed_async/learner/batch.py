"""Converts rows to the tensors of one forward pass.

A row with several completions needs an attention mask in which each completion attends to the
prompt and to itself only, and position ids that restart after the prompt. Log-probabilities and
gradients then equal those of separate completions.

Shape legend: B rows, L positions of a row, C completions, N completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speed_async.learner.rows import TrainingRow, TrainingSample
from speed_async.types import Float32Array

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Inputs of one forward pass. Position ids and mask are None when every row has a single
    completion."""

    input_ids_BL: Tensor  # int64, padded with 0 on the right
    position_ids_BL: Tensor | None  # int64
    mask_B1LL: Tensor | None  # float32, additive attention mask: 0 or -inf
    predictor_index_N: Tensor  # int64 into B * L: the position that predicts the token
    target_ids_N: Tensor  # int64
    behaviour_logprobs_N: Tensor  # float32
    advantages_N: Tensor  # float32
    weights_N: Tensor  # float32, factors on the token losses
    ages_N: Tensor  # int64, staleness in versions; >= 0
    sequence_ids_N: Tensor  # int64 in [0, num_sequences)
    num_sequences: int
    proximal_logprobs_N: Tensor | None  # float32; None: those of the forward pass
    reference_logprobs_N: Tensor | None  # float32; None without a reference policy

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


def make_micro_batch(rows: Sequence[TrainingRow], *, policy_version: int) -> MicroBatch:
    """Converts rows to tensors, without a loop over tokens. `policy_version` is the current one.

    A token of a later version, as after a rollback to a checkpoint, has age 0.
    """
    samples = [sample for row in rows for sample in row.samples]
    layout = _make_layout(rows, samples)
    targets_N = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    prompts = np.concatenate([row.prompt_token_ids for row in rows]).astype(np.int64)
    versions_N = np.concatenate([sample.policy_versions for sample in samples]).astype(np.int64)
    position_ids_BL = mask_B1LL = None
    if len(samples) > len(rows):
        segments_N = layout.sample_N[layout.input_N] + 1
        position_ids_BL = layout.make_grid(layout.prompt_at[1], layout.position_N[layout.input_N])
        mask_B1LL = shared_prompt_mask(
            layout.make_grid(np.zeros_like(prompts), segments_N, fill=-1)
        )
    return MicroBatch(
        input_ids_BL=layout.make_grid(prompts, targets_N[layout.input_N]),
        position_ids_BL=position_ids_BL,
        mask_B1LL=mask_B1LL,
        predictor_index_N=torch.from_numpy(layout.predictor_index_N),
        target_ids_N=torch.from_numpy(targets_N),
        behaviour_logprobs_N=torch.from_numpy(
            np.concatenate([sample.logprobs for sample in samples]).astype(np.float32)
        ),
        advantages_N=layout.repeat_per_token([sample.advantage for sample in samples]),
        weights_N=layout.repeat_per_token([sample.weight for sample in samples]),
        ages_N=torch.from_numpy(np.maximum(policy_version - versions_N, 0)),
        sequence_ids_N=torch.from_numpy(layout.sample_N),
        num_sequences=len(samples),
        proximal_logprobs_N=_concatenated([sample.proximal_logprobs for sample in samples]),
        reference_logprobs_N=_concatenated([sample.reference_logprobs for sample in samples]),
    )


def _concatenated(values: Sequence[Float32Array | None]) -> Tensor | None:
    """(N,), or None if a completion lacks them."""
    present = [value for value in values if value is not None]
    return torch.from_numpy(np.concatenate(present)) if len(present) == len(values) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Position of every token in a B x L grid. Pairs are (row, column) indices."""

    shape: tuple[int, int]
    prompt_at: tuple[IndexArray, IndexArray]  # all prompt tokens, row by row
    input_N: NDArray[np.bool_]  # completion tokens that are model inputs: all but the last of each
    input_at: tuple[IndexArray, IndexArray]  # the tokens of input_N
    sample_N: IndexArray  # completion index of each token
    position_N: IndexArray  # position id of each token
    predictor_index_N: IndexArray

    def make_grid(
        self, prompt_values: IndexArray, input_values: IndexArray, fill: int = 0
    ) -> Tensor:
        grid_BL = np.full(self.shape, fill, dtype=np.int64)
        grid_BL[self.prompt_at] = prompt_values
        grid_BL[self.input_at] = input_values
        return torch.from_numpy(grid_BL)

    def repeat_per_token(self, values_C: Sequence[float]) -> Tensor:
        """Repeats one value per completion (C,) over its tokens (N,), float32."""
        return torch.from_numpy(np.array(values_C, dtype=np.float32)[self.sample_N])


def _make_layout(rows: Sequence[TrainingRow], samples: Sequence[TrainingSample]) -> _Layout:
    prompt_B = np.array([len(row.prompt_token_ids) for row in rows])
    width_B = np.array([len(row.samples) for row in rows])
    length_C = np.array([len(sample.token_ids) for sample in samples])
    row_C = np.repeat(np.arange(len(rows)), width_B)
    first_C = np.cumsum(width_B)[row_C] - width_B[row_C]  # first completion of the same row
    inputs_before_C = np.cumsum(length_C - 1) - (length_C - 1)
    start_C = prompt_B[row_C] + inputs_before_C - inputs_before_C[first_C]
    num_positions = max(row.num_tokens for row in rows)

    sample_N = np.repeat(np.arange(len(samples)), length_C)
    offset_N = _count_up(length_C)
    row_N, prompt_N = row_C[sample_N], prompt_B[row_C][sample_N]
    column_N = start_C[sample_N] + offset_N
    input_N = offset_N < length_C[sample_N] - 1
    predictor_N = np.where(offset_N == 0, prompt_N, column_N) - 1
    return _Layout(
        shape=(len(rows), num_positions),
        prompt_at=(np.repeat(np.arange(len(rows)), prompt_B), _count_up(prompt_B)),
        input_N=input_N,
        input_at=(row_N[input_N], column_N[input_N]),
        sample_N=sample_N,
        position_N=prompt_N + offset_N,
        predictor_index_N=row_N * num_positions + predictor_N,
    )


def shared_prompt_mask(segments_BL: Tensor) -> Tensor:
    """Additive mask (B, 1, L, L): a position attends to the prompt and to earlier positions of its
    own segment.

    Segment 0 is the prompt, each completion has its own segment, and padding is -1. Padding attends
    to the prompt and to earlier padding, so that no softmax row is empty. No other position attends
    to padding.
    """
    num_positions = segments_BL.shape[1]
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    visible_BLL = same_BLL | (segments_BL[:, None, :] == 0)
    visible_BLL &= torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    mask_BLL = torch.zeros(visible_BLL.shape).masked_fill_(~visible_BLL, float("-inf"))
    return mask_BLL[:, None]


def _count_up(lengths: IndexArray) -> IndexArray:
    """Concatenation of 0..n-1 for each n of `lengths`."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
