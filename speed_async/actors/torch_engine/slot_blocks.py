"""Blocks of rows of a slot cache, and what one forward pass reads and writes of them.

All rows of a block have the same number of positions, its capacity, and are contiguous. Contiguous
reads are essential for speed: on a CPU, skipping the last few positions of every row triples the
time per byte. Each block is in one of the regions of the stores, which have space for a full block
of the reserved length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Block:
    region: int
    num_rows: int
    capacity: int

    def padding_with(self, num_rows: int, capacity: int) -> int:
        """Positions added to those of all rows if these rows were in this block."""
        if capacity > self.capacity:
            return self.num_rows * (capacity - self.capacity)
        return num_rows * (self.capacity - capacity)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSpan:
    """Rows of one attention call: the rows of one block."""

    first_row: int
    end_row: int
    capacity: int
    offset: int
    """Start of the region, in vectors of one head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Writes:
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


def new_store(states: Tensor, num_vectors: int) -> Tensor:
    """A store (V, D) for states (..., D)."""
    # Zeros, because masked positions are still multiplied: 0 * NaN is NaN.
    return torch.zeros(num_vectors, states.shape[3], dtype=states.dtype, device=states.device)


def grown(
    regions_RVD: Tensor, blocks: Sequence[Block], *, num_heads: int, num_vectors: int
) -> Tensor:
    """The store (V, D) whose R regions have `num_vectors` each, with the states of these blocks.
    The memory of unused regions is not touched."""
    num_regions, _, dim = regions_RVD.shape
    store_RVD = regions_RVD.new_zeros(num_regions, num_vectors, dim)
    for block in blocks:
        used = block.num_rows * num_heads * block.capacity
        store_RVD[block.region, :used] = regions_RVD[block.region, :used]
    return store_RVD.view(-1, dim)
