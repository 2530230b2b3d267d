"""Converts rows to the tensors of one forward pass.

A row with several completions needs an attention mask in which each completion attends to the
prompt and to itself only, and position ids that restart after the prompt. Log-probabilities and
gradients then equal those of separate completions. Tokens with which several completions begin are
computed once: the positions of a row are a prefix tree in preorder, so that the positions which
attend to one are those from it to the end of its subtree. Tokens of several completions with the
same beginning and the same target have the same log-probability, which is also computed once.

Shape legend: B rows, L positions of a row, C completions, T tokens of the longest, N completion
tokens, D distinct pairs of predicting position and target.
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
    predictor_index_D: Tensor  # int64 into B * L: the position that predicts the target
    target_ids_D: Tensor  # int64
    pair_index_N: Tensor  # int64 into D
    behaviour_logprobs_N: Tensor  # float32
    advantages_N: Tensor  # float32
    weights_N: Tensor  # float32, factors on the token losses
    ages_N: Tensor  # int64, staleness in versions; >= 0
    sequence_ids_N: Tensor  # int64 in [0, num_sequences)
    num_sequences: int
    proximal_logprobs_N: Tensor | None  # float32; None: those of the forward pass
    reference_logprobs_N: Tensor | None  # float32; None without a reference policy
    is_filler: bool = False
    """Contributes nothing: a rank without rows takes part in the collective operations."""

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
    pairs_N = layout.predictor_index_N * (targets_N.max() + 1) + targets_N
    _, first_D, pair_index_N = np.unique(pairs_N, return_index=True, return_inverse=True)
    position_ids_BL = mask_B1LL = None
    if len(samples) > len(rows):
        position_ids_BL = layout.make_grid(layout.prompt_at[1], layout.position_N[layout.input_N])
        num_positions = layout.shape[1]
        mask_B1LL = prefix_tree_mask(
            layout.make_grid(
                np.full_like(prompts, num_positions), layout.end_of_input, fill=num_positions
            )
        )
    return MicroBatch(
        input_ids_BL=layout.make_grid(prompts, targets_N[layout.input_N]),
        position_ids_BL=position_ids_BL,
        mask_B1LL=mask_B1LL,
        predictor_index_D=torch.from_numpy(layout.predictor_index_N[first_D]),
        target_ids_D=torch.from_numpy(targets_N[first_D]),
        pair_index_N=torch.from_numpy(pair_index_N),
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
    input_N: NDArray[np.bool_]  # completion tokens with a position of their own
    input_at: IndexArray  # the tokens of input_N, index into B * L
    end_of_input: IndexArray  # their subtrees' end (exclusive), a column
    sample_N: IndexArray  # completion index of each token
    position_N: IndexArray  # position id of each token
    predictor_index_N: IndexArray

    def make_grid(
        self, prompt_values: IndexArray, input_values: IndexArray, fill: int = 0
    ) -> Tensor:
        grid_BL = np.full(self.shape, fill, dtype=np.int64)
        grid_BL[self.prompt_at] = prompt_values
        grid_BL.ravel()[self.input_at] = input_values
        return torch.from_numpy(grid_BL)

    def repeat_per_token(self, values_C: Sequence[float]) -> Tensor:
        """Repeats one value per completion (C,) over its tokens (N,), float32."""
        return torch.from_numpy(np.array(values_C, dtype=np.float32)[self.sample_N])


def _make_layout(rows: Sequence[TrainingRow], samples: Sequence[TrainingSample]) -> _Layout:
    prompt_B = np.array([len(row.prompt_token_ids) for row in rows])
    width_B = np.array([len(row.samples) for row in rows])
    length_C = np.array([len(sample.token_ids) for sample in samples])
    overlap_C = np.array([overlap for row in rows for overlap in row.overlaps])
    num_positions = max(row.num_tokens for row in rows)
    row_C = np.repeat(np.arange(len(rows)), width_B)
    first_C = np.cumsum(width_B)[row_C] - width_B[row_C]  # first completion of the same row
    own_C = length_C - 1 - overlap_C
    before_C = np.cumsum(own_C) - own_C
    begin_C = row_C * num_positions + prompt_B[row_C]  # first position after the prompt
    start_C = begin_C + before_C - before_C[first_C]

    offset_T = np.arange(length_C.max())
    own_CT = (offset_T >= overlap_C[:, None]) & (offset_T < length_C[:, None] - 1)
    at_CT = np.where(own_CT, (start_C - overlap_C)[:, None] + offset_T, 0)
    at_CT = np.maximum.accumulate(at_CT, axis=0)  # a shared token is that of the sample before
    # A subtree ends where a later completion starts to differ at its depth or above.
    next_CT = np.where(offset_T >= overlap_C[:, None], start_C[:, None], len(rows) * num_positions)
    end_CT = np.minimum.accumulate(next_CT[::-1], axis=0)[::-1]
    end_CT = np.concatenate([end_CT[1:], np.full_like(end_CT[:1], len(rows) * num_positions)])
    end_CT = np.minimum(end_CT - (row_C * num_positions)[:, None], num_positions)

    sample_N = np.repeat(np.arange(len(samples)), length_C)
    offset_N = _count_up(length_C)
    predictor_N = np.where(offset_N == 0, begin_C[sample_N] - 1, at_CT[sample_N, offset_N - 1])
    return _Layout(
        shape=(len(rows), num_positions),
        prompt_at=(np.repeat(np.arange(len(rows)), prompt_B), _count_up(prompt_B)),
        input_N=own_CT[sample_N, offset_N],
        input_at=at_CT[own_CT],
        end_of_input=end_CT[own_CT],
        sample_N=sample_N,
        position_N=prompt_B[row_C][sample_N] + offset_N,
        predictor_index_N=predictor_N,
    )


def prefix_tree_mask(ends_BL: Tensor) -> Tensor:
    """Additive mask (B, 1, L, L): a position attends to itself and to its ancestors.

    `ends_BL` is the end (exclusive) of each position's subtree; L for the prompt and for padding.
    Padding attends to the prompt and to earlier padding, so that no softmax row is empty. No other
    position attends to padding.
    """
    num_positions = ends_BL.shape[1]
    column_L = torch.arange(num_positions)
    visible_BLL = column_L[:, None] < ends_BL[:, None, :]
    visible_BLL &= column_L[:, None] >= column_L
    mask_BLL = torch.zeros(visible_BLL.shape).masked_fill_(~visible_BLL, float("-inf"))
    return mask_BLL[:, None]


def _count_up(lengths: IndexArray) -> IndexArray:
    """Concatenation of 0..n-1 for each n of `lengths`."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
