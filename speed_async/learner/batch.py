"""From rows to the tensors of one forward pass.

Rows of several completions need a mask in which a completion sees its prompt and itself only, and
positions that start anew after the prompt; log-probabilities and gradients are then the same as
those of each completion alone.

Shape legend: B rows, L positions of a row, C completions, N completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speed_async.learner.rows import Row, TrainingSample

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward pass. Position and mask are None when every row holds one completion."""

    input_ids_BL: Tensor  # int64, padded with 0 on the right
    position_ids_BL: Tensor | None  # int64
    mask_B1LL: Tensor | None  # float32, added to attention scores: 0 or -inf
    predictor_index_N: Tensor  # int64 into B * L: the position whose output predicts the token
    target_ids_N: Tensor  # int64
    behaviour_logprobs_N: Tensor  # float32
    advantages_N: Tensor  # float32
    weights_N: Tensor  # float32, factors on the tokens' losses
    ages_N: Tensor  # int64, versions since the token was sampled; >= 0
    sequence_ids_N: Tensor  # int64 in [0, num_sequences)
    num_sequences: int

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


def make_micro_batch(rows: Sequence[Row], *, policy_version: int) -> MicroBatch:
    """Lay rows out as tensors, under the present `policy_version`; no loop over tokens.

    A token of a later version (its lineage was rolled back) has age 0.
    """
    samples = [sample for row in rows for sample in row.samples]
    places = _place(rows, samples)
    targets_N = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    prompts = np.concatenate([row.prompt_token_ids for row in rows]).astype(np.int64)
    versions_N = np.concatenate([sample.policy_versions for sample in samples]).astype(np.int64)
    position_ids_BL = mask_B1LL = None
    if len(samples) > len(rows):
        segments_N = places.sample_N[places.fed_N] + 1
        position_ids_BL = places.lay_out(places.prompt_at[1], places.position_N[places.fed_N])
        mask_B1LL = shared_prompt_mask(places.lay_out(np.zeros_like(prompts), segments_N, fill=-1))
    return MicroBatch(
        input_ids_BL=places.lay_out(prompts, targets_N[places.fed_N]),
        position_ids_BL=position_ids_BL,
        mask_B1LL=mask_B1LL,
        predictor_index_N=torch.from_numpy(places.predictor_index_N),
        target_ids_N=torch.from_numpy(targets_N),
        behaviour_logprobs_N=torch.from_numpy(
            np.concatenate([sample.logprobs for sample in samples]).astype(np.float32)
        ),
        advantages_N=places.spread([sample.advantage for sample in samples]),
        weights_N=places.spread([sample.weight for sample in samples]),
        ages_N=torch.from_numpy(np.maximum(policy_version - versions_N, 0)),
        sequence_ids_N=torch.from_numpy(places.sample_N),
        num_sequences=len(samples),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where every token of some rows stands in a B x L grid; pairs are (row, column) indices."""

    shape: tuple[int, int]
    prompt_at: tuple[IndexArray, IndexArray]  # of all prompt tokens, row after row
    fed_N: NDArray[np.bool_]  # completion tokens that are fed: all but the last of each
    fed_at: tuple[IndexArray, IndexArray]  # of those
    sample_N: IndexArray  # which completion a token belongs to
    position_N: IndexArray  # its position after its own prompt
    predictor_index_N: IndexArray

    def lay_out(self, of_prompts: IndexArray, of_fed: IndexArray, fill: int = 0) -> Tensor:
        grid_BL = np.full(self.shape, fill, dtype=np.int64)
        grid_BL[self.prompt_at] = of_prompts
        grid_BL[self.fed_at] = of_fed
        return torch.from_numpy(grid_BL)

    def spread(self, of_samples: Sequence[float]) -> Tensor:
        """A value of each completion (C,) over its tokens (N,), float32."""
        return torch.from_numpy(np.array(of_samples, dtype=np.float32)[self.sample_N])


def _place(rows: Sequence[Row], samples: Sequence[TrainingSample]) -> _Places:
    prompt_B = np.array([len(row.prompt_token_ids) for row in rows])
    width_B = np.array([len(row.samples) for row in rows])
    length_C = np.array([len(sample.token_ids) for sample in samples])
    row_C = np.repeat(np.arange(len(rows)), width_B)
    first_C = np.cumsum(width_B)[row_C] - width_B[row_C]  # first completion of the same row
    fed_before_C = np.cumsum(length_C - 1) - (length_C - 1)
    start_C = prompt_B[row_C] + fed_before_C - fed_before_C[first_C]
    num_positions = max(row.num_tokens for row in rows)

    sample_N = np.repeat(np.arange(len(samples)), length_C)
    nth_N = _count_up(length_C)
    row_N, prompt_N = row_C[sample_N], prompt_B[row_C][sample_N]
    column_N = start_C[sample_N] + nth_N
    fed_N = nth_N < length_C[sample_N] - 1
    predictor_N = np.where(nth_N == 0, prompt_N, column_N) - 1
    return _Places(
        shape=(len(rows), num_positions),
        prompt_at=(np.repeat(np.arange(len(rows)), prompt_B), _count_up(prompt_B)),
        fed_N=fed_N,
        fed_at=(row_N[fed_N], column_N[fed_N]),
        sample_N=sample_N,
        position_N=prompt_N + nth_N,
        predictor_index_N=row_N * num_positions + predictor_N,
    )


def shared_prompt_mask(segments_BL: Tensor) -> Tensor:
    """Additive mask (B, 1, L, L): a position sees earlier ones of its segment and the prompt.

    Segment 0 is the prompt, each completion has its own, padding is -1 (it sees the prompt and
    earlier padding, so that no row of the softmax is empty, and nothing sees it).
    """
    num_positions = segments_BL.shape[1]
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    seen_BLL = same_BLL | (segments_BL[:, None, :] == 0)
    seen_BLL &= torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    mask_BLL = torch.zeros(seen_BLL.shape).masked_fill_(~seen_BLL, float("-inf"))
    return mask_BLL[:, None]


def _count_up(lengths: IndexArray) -> IndexArray:
    """0..n-1 for each n of `lengths`, one after another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
