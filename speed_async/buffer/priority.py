"""The priority buffer: selection, eviction and staleness of groups.

Priority of a group = (p(1 - p))^w * decay^age, p its pass rate, w the signal weight, age = current
version - version of its oldest token. All groups age equally, so the order of two groups never
changes. w log(p(1 - p)) + oldest_version * log(1 / decay) is therefore a fixed key, and the heaps
need no rebuild.

Selection by p depends on the outcomes of the group itself. It biases the gradient if groups become
stale or are evicted, and not if it only changes when each group is trained (docs/algorithms.md).

A group that is removed leaves its entry in a heap, which is skipped when it is reached. When most
entries are such, the heaps are made anew. An entry that is left of a group that returned is the
same as its new one.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, InstanceOf

from speed_async.transport.messages import GroupFinished

SIGNAL_FLOOR = 1e-6
"""Lower bound on p(1 - p), so that its log exists at a pass rate of 0 or 1."""
MIN_COMPACTION = 64
"""Number of entries of removed groups up to which a heap is not made anew."""


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
    num_takes: int = 0
    waiting: OrderedDict[int, tuple[BufferedGroup, int]] = field(default_factory=OrderedDict)
    """By lease, in order of arrival: group, and number of takes before it arrived."""


class PriorityBuffer:
    """Groups waiting for the learner, one of each lease. Take and insert are O(log n)."""

    def __init__(
        self,
        *,
        capacity_groups: int,
        capacity_bytes: int,
        freshness_decay: float,
        max_passed_over: int,
        signal_weight: float = 1.0,
        state: BufferState | None = None,
    ) -> None:
        """`state` None: an empty buffer. Groups over capacity are evicted at the next insert."""
        self._capacity_groups = capacity_groups
        self._capacity_bytes = capacity_bytes
        self._log_freshness = -math.log(freshness_decay)
        self._max_passed_over = max_passed_over
        self._signal_weight = signal_weight
        self._state = BufferState() if state is None else state
        self._waiting = self._state.waiting
        groups = [group for group, _ in self._waiting.values()]
        self._num_bytes = sum(group.num_bytes for group in groups)
        self._num_tokens = sum(group.num_tokens for group in groups)
        # Of equal keys, the oldest lease is taken first and evicted last.
        self._best = [(-self._key(group), group.lease_id) for group in groups]
        self._worst = [(-minus_key, -lease_id) for minus_key, lease_id in self._best]
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

    def insert(self, group: BufferedGroup, *, num_passed_over: int = 0) -> list[BufferedGroup]:
        """Add a group. Returns the groups evicted to stay within capacity, lowest priority first.

        `num_passed_over` is the number of takes that have already passed over the group. It serves
        to refill a buffer with the groups of `waiting`, in the same order.
        """
        assert group.lease_id not in self._waiting, "a lease has one group"
        key = self._key(group)
        self._waiting[group.lease_id] = (group, self._state.num_takes - num_passed_over)
        self._num_bytes += group.num_bytes
        self._num_tokens += group.num_tokens
        heapq.heappush(self._best, (-key, group.lease_id))
        heapq.heappush(self._worst, (key, -group.lease_id))
        evicted = []
        while len(self) > self._capacity_groups or self._num_bytes > self._capacity_bytes:
            evicted.append(self._remove(self._pop_worst()))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        """Remove and return up to `num_groups` groups: first those passed over `max_passed_over`
        times, then by priority."""
        taken = []
        while len(taken) < num_groups and self._waiting:
            oldest, num_takes_before = next(iter(self._waiting.values()))
            is_overdue = self._state.num_takes - num_takes_before >= self._max_passed_over
            taken.append(self._remove(oldest.lease_id if is_overdue else self._pop_best()))
        self._state.num_takes += 1
        return taken

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        """Remove and return every group with a token older than `oldest_version`, by version and
        then in order of arrival. Takes O(n)."""
        dropped = self.remove_where(lambda group: group.oldest_version < oldest_version)
        return sorted(dropped, key=lambda group: group.oldest_version)

    def waiting(self) -> Iterator[tuple[BufferedGroup, int]]:
        """Every group in order of arrival, with the number of takes that have passed it over."""
        for group, num_takes_before in self._waiting.values():
            yield group, self._state.num_takes - num_takes_before

    def remove_where(self, unwanted: Callable[[BufferedGroup], bool]) -> list[BufferedGroup]:
        """Remove and return the groups that match, in order of arrival. Takes O(n)."""
        found = [group for group, _ in self._waiting.values() if unwanted(group)]
        return [self._remove(group.lease_id) for group in found]

    def _key(self, group: BufferedGroup) -> float:
        signal = max(group.pass_rate * (1 - group.pass_rate), SIGNAL_FLOOR)
        return self._signal_weight * math.log(signal) + group.oldest_version * self._log_freshness

    def _pop_best(self) -> int:
        while (lease_id := heapq.heappop(self._best)[1]) not in self._waiting:
            pass
        return lease_id

    def _pop_worst(self) -> int:
        while (lease_id := -heapq.heappop(self._worst)[1]) not in self._waiting:
            pass
        return lease_id

    def _remove(self, lease_id: int) -> BufferedGroup:
        group, _ = self._waiting.pop(lease_id)
        self._num_bytes -= group.num_bytes
        self._num_tokens -= group.num_tokens
        if max(len(self._best), len(self._worst)) > 2 * len(self) + MIN_COMPACTION:
            self._best = list({entry for entry in self._best if entry[1] in self._waiting})
            self._worst = [(-minus_key, -lease_id) for minus_key, lease_id in self._best]
            heapq.heapify(self._best)
            heapq.heapify(self._worst)
        return group
