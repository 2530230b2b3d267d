"""The KV cache of all slots, laid out so that a decode step streams through it without gaps.

Rows are held in blocks. All rows of a block have the same number of positions, its capacity, and
lie gaplessly one after another; a decode step attends over whole blocks, masked. Reading whole
blocks is what makes it fast: on a CPU, leaving out the last few positions of every row costs
three times the time per byte. Capacities follow the longest row of each block in small steps.

Shape legend: S slots, N rows in use, U rows in one prefill, P prefilled positions, B rows in a
block, H key/value heads, D head dimension, R room of a row (positions it may ever have),
V vectors: S * H * R, one for each slot, head and position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from speed_async.actors.torch_engine.slots import Int64Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Rows that one attention call serves: those in use of one block."""

    first_row: int
    end_row: int
    capacity: int
    offset: int
    """Where the block begins, in vectors of one head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writes:
    """Where the states of one forward pass go, the same in every layer."""

    destinations: Tensor
    """(vectors written,) into a store."""
    sources: Tensor | None
    """(vectors written,) out of the states, row by head by position; None: all of them."""

    def copy(self, states: Tensor, store_VD: Tensor) -> None:
        vectors = states.reshape(-1, store_VD.shape[1])
        if self.sources is not None:
            vectors = vectors.index_select(0, self.sources)
        store_VD.index_copy_(0, self.destinations, vectors)


class SlotCache(Cache):
    """Keys and values, one preallocated (V, D) pair for each layer.

    Passed to the model as `past_key_values`; what `update` does is set beforehand by
    `begin_prefill` or `begin_decode`. Heads and dimensions are learnt from each layer's first
    update.
    """

    def __init__(self, num_slots: int, *, block: int, granule: int) -> None:
        super().__init__(layers=[])
        self.block = block
        self._num_blocks = -(-num_slots // block)
        self._granule = granule
        self._room = granule
        self._capacity = np.full(self._num_blocks, granule, np.int64)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two of (V, D)
        self._num_heads: dict[int, int] = {}  # layer -> H
        self._rows: Int64Array = np.zeros(0, np.int64)
        self._positions: Int64Array = np.zeros((0, 0), np.int64)
        self._lengths: Int64Array | None = None
        """Of the rows in a prefill; None in a decode step."""
        self._writes: dict[int, _Writes] = {}  # by number of heads

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` positions; keeps what is stored."""
        room = self._whole_granules(length)
        if room <= self._room:
            return
        for layer, pair in self._pairs.items():
            keys, values = (self._with_room(store, self._num_heads[layer], room) for store in pair)
            self._pairs[layer] = (keys, values)
        self._room = room

    def fit(self, length: Int64Array) -> None:
        """Let every block hold its longest row; `length` (N,) of the rows in use."""
        for block in range(-(-len(length) // self.block)):
            rows = np.arange(block * self.block, min((block + 1) * self.block, len(length)))
            needed = self._whole_granules(int(length[rows].max()))
            if needed > self._capacity[block]:
                self._lay(block, rows, needed)

    def rearrange(self, sources: Int64Array, length: Int64Array) -> None:
        """Row i takes what row `sources[i]` >= i holds; `length` (N,) is what rows then need."""
        for block in range(-(-len(sources) // self.block)):
            rows = np.arange(block * self.block, min((block + 1) * self.block, len(sources)))
            needed = self._whole_granules(int(length[rows].max()))
            # Ascending: sources lie in this block or in later ones, which are still untouched.
            if (sources[rows] != rows).any() or needed > self._capacity[block]:
                self._lay(block, sources[rows], needed)
        self._capacity[-(-len(sources) // self.block) :] = self._granule

    def copy_prefixes(
        self, sources: Int64Array, destinations: Int64Array, lengths: Int64Array
    ) -> None:
        """Copy the first `lengths[i]` positions of some rows onto other rows."""
        # Short prefixes repeat their last position: the same value lands there twice.
        positions = np.minimum(np.arange(int(lengths.max(initial=0))), lengths[:, None] - 1)
        kept = lengths > 0
        sources, destinations, positions = sources[kept], destinations[kept], positions[kept]
        for layer, pair in self._pairs.items():
            heads = self._num_heads[layer]
            for store in pair:
                values = store.index_select(0, self._index(sources, positions, heads, store))
                store.index_copy_(0, self._index(destinations, positions, heads, store), values)

    def begin_prefill(self, rows: Int64Array, lengths: Int64Array) -> None:
        """The next forward pass is P = max(lengths) wide; of each of these rows (U,) only its
        first `lengths[i]` positions are written, so padding needs no room."""
        num_positions = int(lengths.max())
        self._begin(rows, np.broadcast_to(np.arange(num_positions), (len(rows), num_positions)))
        self._lengths = lengths

    def begin_decode(self, positions: Int64Array) -> list[Span]:
        """The next forward pass writes one position for each of the first N rows.

        Returns the blocks it attends over.
        """
        num_rows = len(positions)
        self._begin(np.arange(num_rows), positions[:, None])
        return [
            Span(
                first_row=start,
                end_row=min(start + self.block, num_rows),
                capacity=int(self._capacity[start // self.block]),
                offset=start * self._room,
            )
            for start in range(0, num_rows, self.block)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store states (rows, H, positions, D); return what the queries attend over.

        That is the states themselves in a prefill; in a decode step the rows' block
        (N, H, capacity, D), or, when there are several blocks, all stores as (1, H, V / H, D).
        """
        if layer_idx not in self._pairs:
            self._num_heads[layer_idx] = key_states.shape[1]
            self._pairs[layer_idx] = (self._new_store(key_states), self._new_store(value_states))
        keys, values = self._pairs[layer_idx]
        num_heads = key_states.shape[1]
        writes = self._writes.get(num_heads)
        if writes is None:
            writes = self._writes[num_heads] = self._plan_writes(num_heads, keys)
        writes.copy(key_states, keys)
        writes.copy(value_states, values)
        if self._lengths is not None:
            return key_states, value_states
        return self._attended(keys, num_heads), self._attended(values, num_heads)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions and masks are always passed in, so models have no use for a true answer."""
        return 0

    def _begin(self, rows: Int64Array, positions: Int64Array) -> None:
        self._rows, self._positions, self._lengths = rows, positions, None
        self._writes.clear()

    def _plan_writes(self, num_heads: int, store_VD: Tensor) -> "_Writes":
        destinations = self._index(self._rows, self._positions, num_heads, store_VD)
        if self._lengths is None or (self._lengths == self._lengths[0]).all():
            return _Writes(destinations=destinations, sources=None)
        in_row = (self._positions < self._lengths[:, None])[:, None, :]
        shape = (len(self._rows), num_heads, self._positions.shape[1])
        sources = np.flatnonzero(np.broadcast_to(in_row, shape))
        sources = torch.from_numpy(sources).to(store_VD.device)
        return _Writes(destinations=destinations[sources], sources=sources)

    def _attended(self, store_VD: Tensor, num_heads: int) -> Tensor:
        if self._num_blocks > 1:
            return store_VD.view(1, num_heads, -1, store_VD.shape[1])
        capacity, num_rows = int(self._capacity[0]), len(self._rows)
        used = store_VD[: num_rows * num_heads * capacity]
        return used.view(num_rows, num_heads, capacity, store_VD.shape[1])

    def _index(
        self, rows: Int64Array, positions: Int64Array, num_heads: int, store_VD: Tensor
    ) -> Tensor:
        """Vectors of these rows at `positions` (rows, positions), for every head, flat."""
        capacity = self._capacity[rows // self.block]
        start = (rows - rows % self.block) * self._room + (rows % self.block) * capacity
        lanes = num_heads * start[:, None] + np.arange(num_heads) * capacity[:, None]
        index = lanes[:, :, None] + positions[:, None, :]
        return torch.from_numpy(index.reshape(-1)).to(store_VD.device)

    def _lay(self, block: int, sources: Int64Array, capacity: int) -> None:
        """Write a block anew, at another capacity, from the rows that are to be in it."""
        held = self._capacity[sources // self.block]
        # Beyond what a source holds anything finite will do: it is masked until written.
        positions = np.minimum(np.arange(capacity), held[:, None] - 1)
        for layer, pair in self._pairs.items():
            heads = self._num_heads[layer]
            for store in pair:
                values = store.index_select(0, self._index(sources, positions, heads, store))
                begin = block * self.block * self._room * heads
                store[begin : begin + len(values)] = values
        self._capacity[block] = capacity

    def _whole_granules(self, length: int) -> int:
        return -(-length // self._granule) * self._granule

    def _new_store(self, states: Tensor) -> Tensor:
        num_vectors = self._num_blocks * self.block * states.shape[1] * self._room
        # Zeros, because a masked position still multiplies: 0 * NaN would be NaN.
        return torch.zeros(num_vectors, states.shape[3], dtype=states.dtype, device=states.device)

    def _with_room(self, store_VD: Tensor, num_heads: int, room: int) -> Tensor:
        dim = store_VD.shape[1]
        blocks = store_VD.view(self._num_blocks, -1, dim)
        num_vectors = self.block * num_heads * room
        grown = store_VD.new_zeros(self._num_blocks, num_vectors, dim)
        grown[:, : blocks.shape[1]] = blocks
        return grown.view(-1, dim)
