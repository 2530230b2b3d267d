"""Slots: the device-side KV cache, and the host-side state of every row.

Rows in use stay at the front, so that a decode step is one slice of every buffer. A row's newest
token is not yet in the KV cache: it is the input of the next decode step.

Shape legend: S slots, N rows in use, C cache positions, L attended positions, U rows in one
prefill, P prefilled positions, H key/value heads, D head dimension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from speed_async.types import FinishReason, Float32Array, Int32Array, Sampled

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Span = tuple[int, int, int]
"""First row, end row, and how many positions these rows attend over."""

_GRANULE = 32
"""Capacity grows in such steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """Rows that changed place; the cache must follow."""

    sources: Int64Array  # (U,)
    destinations: Int64Array  # (U,)
    longest: int


class SlotCache(Cache):
    """Keys and values of all slots, one preallocated (S, H, C, D) pair for each layer.

    Passed to the model as `past_key_values`; what `update` does is set beforehand by
    `begin_prefill` or `begin_decode`. Shapes are learnt from the first update of each layer.
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._capacity = _GRANULE
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two of (S, H, C, D)
        self._rows_U: Tensor | None = None
        self._num_rows = 0
        self._attended = 0
        self._first_position_N = torch.empty(0)
        self._write_index: dict[int, Tensor] = {}  # heads -> (N * heads,)

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` positions; keeps what is stored."""
        if length <= self._capacity:
            return
        self._capacity = -(-length // _GRANULE) * _GRANULE
        for layer, pair in self._pairs.items():
            self._pairs[layer] = (self._grown(pair[0]), self._grown(pair[1]))

    def begin_prefill(self, rows_U: Tensor) -> None:
        """The next forward pass writes positions 0..P-1 of these rows."""
        self._rows_U = rows_U

    def begin_decode(self, positions_N: Tensor, attended: int) -> None:
        """The next forward pass writes one position for each of the first N rows, and attends
        over the first `attended` (L)."""
        self._rows_U = None
        self._num_rows = len(positions_N)
        self._attended = attended
        self._first_position_N = positions_N
        self._write_index.clear()

    def copy_rows(self, sources_U: Tensor, destinations_U: Tensor, length: int) -> None:
        """Copy the first `length` positions of some rows onto others (disjoint sets)."""
        for pair in self._pairs.values():
            for store_SHCD in pair:
                view_SHLD = store_SHCD[:, :, :length]
                view_SHLD[destinations_U] = view_SHLD[sources_U]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store (N, H, 1, D) or (U, H, P, D) states; return what the queries attend over."""
        pair = self._pairs.get(layer_idx)
        if pair is None:
            pair = (self._new_store(key_states), self._new_store(value_states))
            self._pairs[layer_idx] = pair
        if self._rows_U is not None:
            length = key_states.shape[2]
            pair[0][self._rows_U, :, :length] = key_states
            pair[1][self._rows_U, :, :length] = value_states
            return key_states, value_states
        return self._append(pair[0], key_states), self._append(pair[1], value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions and masks are always passed in, so models have no use for a true answer."""
        return 0

    def _append(self, store_SHCD: Tensor, states_NH1D: Tensor) -> Tensor:
        _, num_heads, capacity, dim = store_SHCD.shape
        index = self._write_index.get(num_heads)
        if index is None:
            lanes = torch.arange(self._num_rows * num_heads, device=store_SHCD.device) * capacity
            index = lanes + self._first_position_N.repeat_interleave(num_heads)
            self._write_index[num_heads] = index
        store_SHCD.view(-1, dim).index_copy_(0, index, states_NH1D.reshape(-1, dim))
        return store_SHCD[: self._num_rows, :, : self._attended]

    def _new_store(self, states: Tensor) -> Tensor:
        shape = (self._num_slots, states.shape[1], self._capacity, states.shape[3])
        # Zeros, because a masked position still multiplies: 0 * NaN would be NaN.
        return torch.zeros(shape, dtype=states.dtype, device=states.device)

    def _grown(self, store_SHCD: Tensor) -> Tensor:
        grown = self._new_store(store_SHCD)
        grown[:, :, : store_SHCD.shape[2]] = store_SHCD
        return grown


class SlotTable:
    """What the host knows of every row: tokens, provenance, limits, sampling values."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.block = max(16, num_slots // 8)
        self.num_rows = 0
        """Rows a decode step computes; a few of them may be vacant."""
        self.num_active = 0
        self.tokens_running = 0
        self.active = np.zeros(num_slots, bool)  # (S,)
        self.keys = np.zeros(num_slots, np.int64)  # (S,)
        self.length = np.ones(num_slots, np.int64)  # (S,) prompt plus sampled tokens
        self.num_prompt = np.ones(num_slots, np.int64)  # (S,)
        self.limit = np.zeros(num_slots, np.int64)  # (S,)
        self.temperature = np.ones(num_slots, np.float32)  # (S,)
        self.top_p = np.ones(num_slots, np.float32)  # (S,)
        self.feed = np.zeros((2, num_slots), np.int64)  # (2, S) newest token, its position
        self.tokens: Int32Array = np.zeros((num_slots, _GRANULE), np.int32)  # (S, C)
        self.logprobs: Float32Array = np.zeros((num_slots, _GRANULE), np.float32)  # (S, C)
        self.versions: Int32Array = np.zeros((num_slots, _GRANULE), np.int32)  # (S, C)
        self._rows = np.arange(num_slots)  # (S,)

    def reserve(self, length: int) -> None:
        missing = length - self.tokens.shape[1]
        if missing > 0:
            for name in ("tokens", "logprobs", "versions"):
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, missing))))

    def spans(self) -> list[Span]:
        """Cut the rows in use into runs of blocks of similar length."""
        spans: list[Span] = []
        for block, length in enumerate(self._block_lengths()[: -(-self.num_rows // self.block)]):
            start, end = block * self.block, min((block + 1) * self.block, self.num_rows)
            # Whole vectors for the attention kernel: eight floats.
            attended = -(-int(length) // 8) * 8
            if spans and abs(spans[-1][2] - attended) <= 8:
                start, attended = spans[-1][0], max(spans[-1][2], attended)
                spans.pop()
            spans.append((start, end, attended))
        return spans

    def _block_lengths(self) -> Int64Array:
        """Longest sequence of every block (1 where there is none)."""
        return np.maximum.reduceat(self.length, np.arange(0, self.num_slots, self.block))

    def occupy(
        self,
        row: int,
        key: int,
        prompt_token_ids: Int32Array,
        limit: int,
        temperature: float,
        top_p: float,
    ) -> None:
        num_prompt = len(prompt_token_ids)
        self.tokens[row, :num_prompt] = prompt_token_ids
        self.keys[row] = key
        self.length[row] = self.num_prompt[row] = num_prompt
        self.limit[row] = limit
        self.temperature[row], self.top_p[row] = temperature, top_p
        self.feed[:, row] = prompt_token_ids[-1], num_prompt - 1
        self.active[row] = True
        self.num_active += 1
        self.num_rows = max(self.num_rows, row + 1)

    def append(self, tokens_N: Int64Array, logprobs_N: Float32Array, policy_version: int) -> None:
        """One sampled token for every row in use (vacant rows take it where nobody looks)."""
        count = self.num_rows
        rows_N, length_N = self._rows[:count], self.length[:count]
        self.tokens[rows_N, length_N] = tokens_N
        self.logprobs[rows_N, length_N] = logprobs_N
        self.versions[rows_N, length_N] = policy_version
        self.feed[0, :count] = tokens_N
        self.feed[1, :count] += self.active[:count]
        self.length[:count] += self.active[:count]
        self.tokens_running += self.num_active

    def release(self, row: int, finish_reason: FinishReason) -> Sampled:
        """Vacate a row and return its completion."""
        span = slice(int(self.num_prompt[row]), int(self.length[row]))
        sampled = Sampled(
            token_ids=self.tokens[row, span].copy(),
            logprobs=self.logprobs[row, span].copy(),
            policy_versions=self.versions[row, span].copy(),
            finish_reason=finish_reason,
        )
        self._vacate(row)
        self.num_active -= 1
        self.tokens_running -= sampled.num_tokens
        return sampled

    @property
    def is_sparse(self) -> bool:
        """Whether closing gaps is worth its copies: a move costs about as much as a few steps
        that compute a vacant row for nothing."""
        return 8 * (self.num_rows - self.num_active) > self.num_rows

    def cut_tail(self) -> None:
        """Drop vacant rows at the end from `num_rows`."""
        occupied = np.flatnonzero(self.active[: self.num_rows])
        self.num_rows = int(occupied[-1]) + 1 if len(occupied) else 0

    def close_gaps(self) -> list[Moves]:
        """Shift sequences forward over vacant rows, keeping their order.

        Order is age, so rows of one block stay alike in length. Moves are to be done in turn:
        none overwrites the source of a later one.
        """
        sources = np.flatnonzero(self.active[: self.num_rows])
        destinations = np.arange(self.num_active)
        self.num_rows = self.num_active
        shifted = sources != destinations
        sources, destinations = sources[shifted], destinations[shifted]
        if not len(sources):
            return []
        moves = [
            Moves(
                sources=sources[start : start + self.block],
                destinations=destinations[start : start + self.block],
                longest=int(self.length[sources[start : start + self.block]].max()),
            )
            for start in range(0, len(sources), self.block)
        ]
        for name in ("tokens", "logprobs", "versions", "keys", "length", "num_prompt", "limit"):
            getattr(self, name)[destinations] = getattr(self, name)[sources]
        for name in ("temperature", "top_p"):
            getattr(self, name)[destinations] = getattr(self, name)[sources]
        self.feed[:, destinations] = self.feed[:, sources]
        self.active[: self.num_active] = True
        self._vacate(np.arange(self.num_active, sources[-1] + 1))
        return moves

    def _vacate(self, rows: int | Int64Array) -> None:
        self.active[rows] = False
        # A vacant row is still computed until it is filled or cut off: keep it cheap and harmless.
        self.length[rows] = self.num_prompt[rows] = 1
        self.temperature[rows] = self.top_p[rows] = 1.0
        self.feed[1, rows] = 0
