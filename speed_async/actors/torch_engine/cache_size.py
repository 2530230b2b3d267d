"""Size of the torch engine's KV cache, without torch: the preflight checks compute with it too."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLayout:
    """How a cache divides its slots; see slot_cache.py."""

    block: int
    """Rows of a block."""
    granularity: int
    """Capacities of blocks are multiples of this number of positions."""
    num_regions: int

    def num_positions(self, length: int) -> int:
        """Positions of all slots together, with space for sequences of this length."""
        return self.num_regions * self.block * self.round_up(length)

    def round_up(self, length: int) -> int:
        return -(-length // self.granularity) * self.granularity


def cache_layout(num_slots: int, *, in_blocks: bool) -> CacheLayout:
    """`in_blocks`: on a CPU, where shorter reads outweigh the calls that several blocks need."""
    if in_blocks:
        return block_layout(num_slots, block=max(16, num_slots // 4), granularity=16)
    return block_layout(num_slots, block=num_slots, granularity=64)


def block_layout(num_slots: int, *, block: int, granularity: int) -> CacheLayout:
    # Two regions more than blocks: rows then rarely have to be moved.
    num_regions = 1 if block >= num_slots else -(-num_slots // block) + 2
    return CacheLayout(block=block, granularity=granularity, num_regions=num_regions)
