"""The KV cache of all slots, with a layout that a decode step reads contiguously.

Rows are stored in blocks (slot_blocks.py); a decode step attends over whole blocks with a mask.
Rows that enter together share blocks, so they have similar lengths, and the capacity of a block
follows its longest row in small steps. Rows are numbered in the order of their blocks.

Shape legend: N rows in use, U rows added or prefilled, P prefilled positions, K rows kept, H
key/value heads, D head dimension, V vectors: one for each position and head in all regions.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from speed_async.actors.torch_engine.cache_size import CacheLayout
from speed_async.actors.torch_engine.slot_blocks import Block, SlotSpan, Writes, grown, new_store
from speed_async.actors.torch_engine.slots import Int64Array

MAX_PADDING = 64
"""Blocks are joined if that adds at most this many positions to those that a step reads. On a CPU,
a call of the attention operator costs about as much."""


class SlotCache(Cache):
    """Keys and values, one preallocated (V, D) pair per layer.

    Passed to the model as `past_key_values`. `begin_prefill` or `begin_decode` configures the
    following calls of `update`. The number of heads and the head dimension are taken from each
    layer's first update.
    """

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__(layers=[])
        self.block = layout.block
        self._num_regions = layout.num_regions
        self._free = list(range(self._num_regions))
        self._blocks: list[Block] = []
        self._round_up = layout.round_up
        self._max_positions = layout.granularity
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two of (V, D)
        self._num_heads: dict[int, int] = {}  # layer -> H
        self._rows: Int64Array = np.zeros(0, np.int64)
        self._positions: Int64Array = np.zeros((0, 0), np.int64)
        self._lengths: Int64Array | None = None
        """Lengths of the rows in a prefill; None in a decode step."""
        self._writes: dict[int, Writes] = {}  # by number of heads

    def reserve(self, length: int) -> None:
        """Reserve space for sequences of `length` positions; preserves the stored states."""
        max_positions = self._round_up(length)
        if max_positions <= self._max_positions:
            return
        for layer, pair in self._pairs.items():
            keys, values = (
                grown(
                    store.view(self._num_regions, -1, store.shape[1]),
                    self._blocks,
                    num_heads=self._num_heads[layer],
                    num_vectors=self.block * self._num_heads[layer] * max_positions,
                )
                for store in pair
            )
            self._pairs[layer] = (keys, values)
        self._max_positions = max_positions

    def append(self, length: Int64Array) -> None:
        """Add rows for sequences of these lengths (U,) after the last row."""
        while len(length):
            capacity = self._round_up(int(length[: self.block].max()))
            last = self._blocks[-1] if self._blocks else Block(region=0, num_rows=0, capacity=0)
            count = min(self.block - last.num_rows, len(length)) if last.num_rows else 0
            if not self._free and not count:
                self._free_region()
                continue
            if count and (not self._free or last.padding_with(count, capacity) <= MAX_PADDING):
                self._resize(last, max(last.capacity, capacity))
                last.num_rows += count
            else:
                count = min(self.block, len(length))
                region = self._free.pop()
                self._blocks.append(Block(region=region, num_rows=count, capacity=capacity))
            length = length[count:]

    def fit(self, length: Int64Array) -> None:
        """Grow every block to the length of its longest row; `length` (N,)."""
        start = 0
        for block in self._blocks:
            longest = int(length[start : start + block.num_rows].max())
            if longest > block.capacity:
                self._resize(block, self._round_up(longest))
            start += block.num_rows

    def keep(self, kept_N: NDArray[np.bool_], length: Int64Array) -> Int64Array:
        """Remove the other rows; `length` (N,) before. Row i (K,) then is row result[i] before."""
        sources_N = np.arange(len(kept_N))
        in_use_N = np.zeros(len(kept_N), bool)
        counts, start = [], 0
        for block in self._blocks:
            kept = kept_N[start : start + block.num_rows]
            count = int(kept.sum())
            # The last rows of a block fill its gaps: fewer copies than moving all later rows.
            fillers = start + count + np.flatnonzero(kept[count:])
            sources_N[start + np.flatnonzero(~kept[:count])] = fillers
            in_use_N[start : start + count] = True
            counts.append(count)
            start += block.num_rows
        filled = np.flatnonzero(in_use_N & ~kept_N)
        self.copy_prefixes(sources_N[filled], filled, length[sources_N[filled]] - 1)
        for block, count in zip(self._blocks, counts, strict=True):
            block.num_rows = count
        self._free += [block.region for block in self._blocks if not block.num_rows]
        self._blocks = [block for block in self._blocks if block.num_rows]
        sources_K = sources_N[in_use_N]
        self._tighten(length[sources_K])
        return sources_K

    def copy_prefixes(
        self, sources: Int64Array, destinations: Int64Array, lengths: Int64Array
    ) -> None:
        """Copy the first `lengths[i]` positions of row `sources[i]` to row `destinations[i]`."""
        # Shorter prefixes repeat their last position, which is then written more than once.
        positions = np.minimum(np.arange(int(lengths.max(initial=0))), lengths[:, None] - 1)
        nonempty = lengths > 0
        sources, destinations = sources[nonempty], destinations[nonempty]
        positions = positions[nonempty]
        if not len(sources):
            return
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
        """Configure a forward pass that writes one position (N,) for each row.

        Returns the spans that it attends over.
        """
        self._begin(np.arange(len(positions)), positions[:, None])
        spans, start = [], 0
        for block in self._blocks:
            spans.append(
                SlotSpan(
                    first_row=start,
                    end_row=start + block.num_rows,
                    capacity=block.capacity,
                    offset=block.region * self.block * self._max_positions,
                )
            )
            start += block.num_rows
        return spans

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store states (rows, H, positions, D); return the states that the queries attend over.

        In a prefill these are the input states. In a decode step they are the rows' block
        (N, H, capacity, D), or, with several blocks, the whole store as (1, H, V / H, D).
        """
        num_heads = key_states.shape[1]
        if layer_idx not in self._pairs:
            self._num_heads[layer_idx] = num_heads
            vectors = self._num_regions * self.block * num_heads * self._max_positions
            self._pairs[layer_idx] = (
                new_store(key_states, vectors),
                new_store(value_states, vectors),
            )
        keys, values = self._pairs[layer_idx]
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

    def _plan_writes(self, num_heads: int, store_VD: Tensor) -> Writes:
        destinations = self._index(self._rows, self._positions, num_heads, store_VD)
        if self._lengths is None or (self._lengths == self._lengths[0]).all():
            return Writes(destinations=destinations, sources=None)
        in_row = (self._positions < self._lengths[:, None])[:, None, :]
        shape = (len(self._rows), num_heads, self._positions.shape[1])
        sources = np.flatnonzero(np.broadcast_to(in_row, shape))
        sources = torch.from_numpy(sources).to(store_VD.device)
        return Writes(destinations=destinations[sources], sources=sources)

    def _attended(self, store_VD: Tensor, num_heads: int) -> Tensor:
        if self._num_regions > 1:
            return store_VD.view(1, num_heads, -1, store_VD.shape[1])
        return self._view(store_VD, num_heads, self._blocks[0])

    def _view(self, store_VD: Tensor, num_heads: int, block: Block) -> Tensor:
        """The states (rows, H, capacity, D) of a block."""
        start = block.region * self.block * num_heads * self._max_positions
        shape = (block.num_rows, num_heads, block.capacity, store_VD.shape[1])
        return store_VD[start : start + math.prod(shape[:3])].view(shape)

    def _index(
        self, rows: Int64Array, positions: Int64Array, num_heads: int, store_VD: Tensor
    ) -> Tensor:
        """Flat vector indices of these rows at `positions` (rows, positions), for every head."""
        num_rows = np.array([block.num_rows for block in self._blocks])
        blocks = np.repeat(np.arange(len(num_rows)), num_rows)[rows]  # of each row
        capacity = np.array([block.capacity for block in self._blocks])[blocks]
        region = np.array([block.region for block in self._blocks])[blocks]
        in_block = rows - (np.cumsum(num_rows) - num_rows)[blocks]
        start = region * self.block * self._max_positions + in_block * capacity
        head_starts = num_heads * start[:, None] + np.arange(num_heads) * capacity[:, None]
        index = head_starts[:, :, None] + positions[:, None, :]
        return torch.from_numpy(index.reshape(-1)).to(store_VD.device)

    def _tighten(self, length: Int64Array) -> None:
        """Shrink and join blocks where steps then read less; `length` (N,)."""
        start = 0
        for block in self._blocks:
            capacity = self._round_up(int(length[start : start + block.num_rows].max()))
            if 4 * capacity <= 3 * block.capacity:
                self._resize(block, capacity)
            start += block.num_rows
        for index in reversed(range(len(self._blocks) - 1)):
            block, after = self._blocks[index : index + 2]
            fits = block.num_rows + after.num_rows <= self.block
            if fits and block.padding_with(after.num_rows, after.capacity) <= MAX_PADDING:
                self._join(index)

    def _free_region(self) -> None:
        """Fill blocks from the next ones, beginning with the oldest, until a region is free."""
        index = 0
        while not self._free:
            if self._blocks[index].num_rows < self.block:
                self._join(index)
            else:
                index += 1

    def _join(self, index: int) -> None:
        """Move the first rows of the next block, as many as fit, to the end of this block."""
        block, after = self._blocks[index : index + 2]
        count = min(self.block - block.num_rows, after.num_rows)
        self._resize(block, max(block.capacity, after.capacity))
        first = block.num_rows
        block.num_rows += count
        for store, num_heads in self._stores():
            states = self._view(store, num_heads, after).clone()
            self._view(store, num_heads, block)[first:, :, : after.capacity] = states[:count]
            self._view(store, num_heads, after)[: after.num_rows - count] = states[count:]
        after.num_rows -= count
        if not after.num_rows:
            self._free.append(after.region)
            del self._blocks[index + 1]

    def _resize(self, block: Block, capacity: int) -> None:
        if capacity == block.capacity:
            return
        # A region that is not free is read completely before it is written.
        region = self._free.pop() if self._free else block.region
        resized = Block(region=region, num_rows=block.num_rows, capacity=capacity)
        # Positions that are not written yet only need finite values: they are masked.
        copied = min(capacity, block.capacity)
        for store, num_heads in self._stores():
            states = self._view(store, num_heads, block)[:, :, :copied]
            if region == block.region:
                states = states.clone()
            self._view(store, num_heads, resized)[:, :, :copied] = states
        if region != block.region:
            self._free.append(block.region)
        block.region, block.capacity = region, capacity

    def _stores(self) -> Iterator[tuple[Tensor, int]]:
        """All stores, each with its number of heads."""
        for layer, pair in self._pairs.items():
            for store in pair:
                yield store, self._num_heads[layer]
