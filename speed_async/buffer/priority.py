"""The priority buffer: selection, eviction and staleness of groups.

Groups whose oldest token has the lowest policy version come first, since they become stale first.
Among groups of the same version, those with the largest p(1 - p) come first (p is the pass rate of
the group), or else the first to arrive. All groups age equally, so the order of two groups never
changes, and the heaps need no rebuild.

Selection by p depends on the outcomes of the group itself. It biases the gradient if groups become
stale or are evicted, and not if it only changes when each group is trained (docs/algorithms.md).

A group that is removed leaves its entry in a heap, which is skipped when it is reached. When most
entries are such, the heaps are made anew. An entry that is left of a group that returned is the
same as its new one.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, InstanceOf

from speed_async.transport.messages import GroupFinished

MIN_COMPACTION = 64
"""Number of entries of removed groups up to which a heap is not made anew."""


Rank = tuple[int, float, int]
"""Version of the oldest token, -p(1 - p) and lease of a group. The lowest is trained first, and the
highest is evicted first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedGroup:
    """A finished group and its metadata."""

    message: Annotated[InstanceOf[GroupFinished] | None, Field(exclude=True)] = None
    """None while the group is on disk, at `place`. A snapshot excludes it."""
    lease_id: int
    pass_rate: float
    oldest_version: int
    mean_version: float
    num_tokens: int
    num_bytes: int
    place: tuple[int, int] | None = None
    """Journal segment and offset in it, both from 0; None without a journal."""


@dataclass(kw_only=True, slots=True)
class BufferState:
    waiting: OrderedDict[int, BufferedGroup] = field(default_factory=OrderedDict)
    """By lease, in order of arrival."""


class PriorityBuffer:
    """Groups waiting for the learner, one of each lease. Take and insert are O(log n)."""

    def __init__(
        self,
        *,
        capacity_groups: int,
        capacity_bytes: int,
        by_signal: bool = True,
        state: BufferState | None = None,
    ) -> None:
        """`by_signal`: order groups of the same version by p(1 - p), else by arrival. `state` None:
        an empty buffer. Groups over capacity are evicted at the next insert."""
        self._capacity_groups = capacity_groups
        self._capacity_bytes = capacity_bytes
        self._by_signal = by_signal
        self._waiting = (BufferState() if state is None else state).waiting
        groups = self._waiting.values()
        self._num_bytes = sum(group.num_bytes for group in groups)
        self._num_tokens = sum(group.num_tokens for group in groups)
        self._best = [self._rank(group) for group in groups]
        self._worst = [_reversed(rank) for rank in self._best]
        heapq.heapify(self._best)
        heapq.heapify(self._worst)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def insert(self, group: BufferedGroup) -> list[BufferedGroup]:
        """Add a group. Returns the groups evicted to stay within capacity, the last in order
        first."""
        assert group.lease_id not in self._waiting, "a lease has one group"
        rank = self._rank(group)
        self._waiting[group.lease_id] = group
        self._num_bytes += group.num_bytes
        self._num_tokens += group.num_tokens
        heapq.heappush(self._best, rank)
        heapq.heappush(self._worst, _reversed(rank))
        evicted = []
        while len(self) > self._capacity_groups or self._num_bytes > self._capacity_bytes:
            evicted.append(self._remove(self._pop_worst()))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        """Remove and return the first `num_groups` groups, or all if there are fewer."""
        return [self._remove(self._pop_best()) for _ in range(min(num_groups, len(self)))]

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        """Remove and return every group with a token older than `oldest_version`, by version and
        then in order of arrival. Takes O(n)."""
        dropped = self.remove_where(lambda group: group.oldest_version < oldest_version)
        return sorted(dropped, key=lambda group: group.oldest_version)

    def waiting(self) -> Iterator[BufferedGroup]:
        """Every group in order of arrival."""
        yield from self._waiting.values()

    def remove_where(self, unwanted: Callable[[BufferedGroup], bool]) -> list[BufferedGroup]:
        """Remove and return the groups that match, in order of arrival. Takes O(n)."""
        found = [group for group in self._waiting.values() if unwanted(group)]
        return [self._remove(group.lease_id) for group in found]

    def _rank(self, group: BufferedGroup) -> Rank:
        signal = group.pass_rate * (1 - group.pass_rate) if self._by_signal else 0.0
        return group.oldest_version, -signal, group.lease_id

    def _pop_best(self) -> int:
        while (lease_id := heapq.heappop(self._best)[2]) not in self._waiting:
            pass
        return lease_id

    def _pop_worst(self) -> int:
        while (lease_id := -heapq.heappop(self._worst)[2]) not in self._waiting:
            pass
        return lease_id

    def _remove(self, lease_id: int) -> BufferedGroup:
        group = self._waiting.pop(lease_id)
        self._num_bytes -= group.num_bytes
        self._num_tokens -= group.num_tokens
        if max(len(self._best), len(self._worst)) > 2 * len(self) + MIN_COMPACTION:
            self._best = list({entry for entry in self._best if entry[2] in self._waiting})
            self._worst = [_reversed(rank) for rank in self._best]
            heapq.heapify(self._best)
            heapq.heapify(self._worst)
        return group


def _reversed(rank: Rank) -> Rank:
    version, minus_signal, lease_id = rank
    return -version, -minus_signal, -lease_id
