"""The KV cache of all slots, with a layout that a decode step reads contiguously.

Rows are stored in blocks. All rows of a block have the same number of positions, its capacity, and
are contiguous; a decode step attends over whole blocks with a mask. Contiguous reads are essential
for speed: on a CPU, skipping the last few positions of every row triples the time per byte. The
capacity of a block follows its longest row in small steps.

Shape legend: S slots, N rows in use, U rows in one prefill, P prefilled positions, B rows in a
block, H key/value heads, D head dimension, R reserved positions per row,
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
class SlotSpan:
    """Rows of one attention call: the rows in use of one block."""

    first_row: int
    end_row: int
    capacity: int
    offset: int
    """Start of the block, in vectors of one head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writes:
    """Scatter indices for the states of one forward pass, shared by all layers."""

    destinations: Tensor
    """(vectors written,) indices into a store."""
    sources: Tensor | None
    """(vectors written,) indices into the states (row, head, position); None: all states."""

    def copy(self, states: Tensor, store_VD: Tensor) -> None:
        vectors = states.reshape(-1, store_VD.shape[1])
        if self.sources is not None:
            vectors = vectors.index_select(0, self.sources)
        store_VD.index_copy_(0, self.destinations, vectors)


class SlotCache(Cache):
    """Keys and values, one preallocated (V, D) pair per layer.

    Passed to the model as `past_key_values`. `begin_prefill` or `begin_decode` configures the
    following calls of `update`. The number of heads and the head dimension are taken from each
    layer's first update.
    """

    def __init__(self, num_slots: int, *, block: int, granularity: int) -> None:
        super().__init__(layers=[])
        self.block = block
        self._num_blocks = -(-num_slots // block)
        self._granularity = granularity
        self._max_positions = granularity
        self._capacity = np.full(self._num_blocks, granularity, np.int64)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two of (V, D)
        self._num_heads: dict[int, int] = {}  # layer -> H
        self._rows: Int64Array = np.zeros(0, np.int64)
        self._positions: Int64Array = np.zeros((0, 0), np.int64)
        self._lengths: Int64Array | None = None
        """Lengths of the rows in a prefill; None in a decode step."""
        self._writes: dict[int, _Writes] = {}  # by number of heads

    def reserve(self, length: int) -> None:
        """Reserve space for sequences of `length` positions; preserves the stored states."""
        max_positions = self._round_up(length)
        if max_positions <= self._max_positions:
            return
        for layer, pair in self._pairs.items():
            keys, values = (
                self._resized(store, self._num_heads[layer], max_positions) for store in pair
            )
            self._pairs[layer] = (keys, values)
        self._max_positions = max_positions

    def fit(self, length: Int64Array) -> None:
        """Grow every block to the length of its longest row; `length` (N,) of the rows in use."""
        for block in range(-(-len(length) // self.block)):
            rows = np.arange(block * self.block, min((block + 1) * self.block, len(length)))
            needed = self._round_up(int(length[rows].max()))
            if needed > self._capacity[block]:
                self._rebuild_block(block, rows, needed)

    def rearrange(self, sources: Int64Array, length: Int64Array) -> None:
        """Move row `sources[i]` >= i to row i; `length` (N,) of the rows after the move."""
        for block in range(-(-len(sources) // self.block)):
            rows = np.arange(block * self.block, min((block + 1) * self.block, len(sources)))
            needed = self._round_up(int(length[rows].max()))
            # Ascending: sources are in this block or in later ones, which are not rewritten yet.
            if (sources[rows] != rows).any() or needed > self._capacity[block]:
                self._rebuild_block(block, sources[rows], needed)
        self._capacity[-(-len(sources) // self.block) :] = self._granularity

    def copy_prefixes(
        self, sources: Int64Array, destinations: Int64Array, lengths: Int64Array
    ) -> None:
        """Copy the first `lengths[i]` positions of row `sources[i]` to row `destinations[i]`."""
        # Shorter prefixes repeat their last position, which is then written more than once.
        positions = np.minimum(np.arange(int(lengths.max(initial=0))), lengths[:, None] - 1)
        nonempty = lengths > 0
        sources, destinations = sources[nonempty], destinations[nonempty]
        positions = positions[nonempty]
        for layer, pair in self._pairs.items():
            heads = self._num_heads[layer]
            for store in pair:
                values = store.index_select(0, self._index(sources, positions, heads, store))
                store.index_copy_(0, self._index(destinations, positions, heads, store), values)

    def begin_prefill(self, rows: Int64Array, lengths: Int64Array) -> None:
        """Configure a forward pass of width P = max(lengths) over these rows (U,).

        Only the first `lengths[i]` positions of each row are written; padding takes no space.
        """
        num_positions = int(lengths.max())
        self._begin(rows, np.broadcast_to(np.arange(num_positions), (len(rows), num_positions)))
        self._lengths = lengths

    def begin_decode(self, positions: Int64Array) -> list[SlotSpan]:
        """Configure a forward pass that writes one position for each of the first N rows.

        Returns the spans that it attends over.
        """
        num_rows = len(positions)
        self._begin(np.arange(num_rows), positions[:, None])
        return [
            SlotSpan(
                first_row=start,
                end_row=min(start + self.block, num_rows),
                capacity=int(self._capacity[start // self.block]),
                offset=start * self._max_positions,
            )
            for start in range(0, num_rows, self.block)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store states (rows, H, positions, D); return the states that the queries attend over.

        In a prefill these are the input states. In a decode step they are the rows' block
        (N, H, capacity, D), or, with several blocks, the whole store as (1, H, V / H, D).
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
        """Always 0: positions and masks are passed explicitly, so models do not use this value."""
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
        """Flat vector indices of these rows at `positions` (rows, positions), for every head."""
        capacity = self._capacity[rows // self.block]
        start = (rows - rows % self.block) * self._max_positions + (rows % self.block) * capacity
        head_starts = num_heads * start[:, None] + np.arange(num_heads) * capacity[:, None]
        index = head_starts[:, :, None] + positions[:, None, :]
        return torch.from_numpy(index.reshape(-1)).to(store_VD.device)

    def _rebuild_block(self, block: int, sources: Int64Array, capacity: int) -> None:
        """Rewrite a block from its source rows, with a new capacity."""
        available = self._capacity[sources // self.block]
        # Positions past a source's capacity only need finite values: they are masked until written.
        positions = np.minimum(np.arange(capacity), available[:, None] - 1)
        for layer, pair in self._pairs.items():
            heads = self._num_heads[layer]
            for store in pair:
                values = store.index_select(0, self._index(sources, positions, heads, store))
                begin = block * self.block * self._max_positions * heads
                store[begin : begin + len(values)] = values
        self._capacity[block] = capacity

    def _round_up(self, length: int) -> int:
        return -(-length // self._granularity) * self._granularity

    def _new_store(self, states: Tensor) -> Tensor:
        num_vectors = self._num_blocks * self.block * states.shape[1] * self._max_positions
        # Zeros, because masked positions are still multiplied: 0 * NaN is NaN.
        return torch.zeros(num_vectors, states.shape[3], dtype=states.dtype, device=states.device)

    def _resized(self, store_VD: Tensor, num_heads: int, max_positions: int) -> Tensor:
        dim = store_VD.shape[1]
        blocks = store_VD.view(self._num_blocks, -1, dim)
        num_vectors = self.block * num_heads * max_positions
        grown = store_VD.new_zeros(self._num_blocks, num_vectors, dim)
        grown[:, : blocks.shape[1]] = blocks
        return grown.view(-1, dim)
