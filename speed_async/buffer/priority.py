"""The priority buffer: what to take next, what to evict, what is too old.

Priority of a group = (p(1 - p))^w * decay^age, p its pass rate, w the signal weight, age = present
version - its oldest token's version. Because every group ages alike, the order between two groups
never changes, so w log(p(1 - p)) + oldest_version * log(1 / decay) is a fixed key and heaps need
no rebuild.

A choice by p looks at the outcomes of the group itself; it biases the gradient where groups are
left to go stale or are evicted, and not where each is only trained sooner or later
(docs/estimators.md).
"""

import heapq
import math
from collections import OrderedDict
from dataclasses import dataclass

from speed_async.wire.messages import GroupFinished

SIGNAL_FLOOR = 1e-6
"""Stands in for p(1 - p) of a group whose final pass rate is 0 or 1, so that its log exists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedGroup:
    """A finished group and what the buffer needs to know of it."""

    message: GroupFinished
    pass_rate: float
    oldest_version: int
    mean_version: float
    num_tokens: int
    num_bytes: int

    @property
    def lease_id(self) -> int:
        return self.message.lease_id


class PriorityBuffer:
    """Groups waiting for the learner. Take and insert are O(log n)."""

    def __init__(
        self,
        *,
        capacity_groups: int,
        capacity_bytes: int,
        freshness_decay: float,
        max_passed_over: int,
        signal_weight: float = 1.0,
    ) -> None:
        self._capacity_groups = capacity_groups
        self._capacity_bytes = capacity_bytes
        self._log_freshness = -math.log(freshness_decay)
        self._max_passed_over = max_passed_over
        self._signal_weight = signal_weight
        self._num_takes = 0
        self._num_bytes = 0
        # Insertion order, with the number of takes that had happened before the insertion.
        self._groups: OrderedDict[int, tuple[BufferedGroup, int]] = OrderedDict()
        self._best: list[tuple[float, int]] = []
        self._worst: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def num_tokens(self) -> int:
        return sum(group.num_tokens for group, _ in self._groups.values())

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def insert(self, group: BufferedGroup) -> list[BufferedGroup]:
        """Add a group; returns those evicted to stay within capacity (least useful first)."""
        key = self._key(group)
        self._groups[group.lease_id] = (group, self._num_takes)
        self._num_bytes += group.num_bytes
        # Ties: the oldest lease is taken first and evicted last.
        heapq.heappush(self._best, (-key, group.lease_id))
        heapq.heappush(self._worst, (key, -group.lease_id))
        evicted = []
        while len(self._groups) > self._capacity_groups or self._num_bytes > self._capacity_bytes:
            evicted.append(self._remove(self._pop_worst()))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        """The next `num_groups`: first those passed over too often, then by priority.

        Returns fewer when there are fewer.
        """
        taken = [self._remove(lease_id) for lease_id in self._overdue(num_groups)]
        while len(taken) < num_groups and self._groups:
            taken.append(self._remove(self._pop_best()))
        self._num_takes += 1
        return taken

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        """Remove and return every group with a token from before `oldest_version`."""
        stale = [
            lease_id
            for lease_id, (group, _) in self._groups.items()
            if group.oldest_version < oldest_version
        ]
        return [self._remove(lease_id) for lease_id in stale]

    def _key(self, group: BufferedGroup) -> float:
        signal = max(group.pass_rate * (1 - group.pass_rate), SIGNAL_FLOOR)
        return self._signal_weight * math.log(signal) + group.oldest_version * self._log_freshness

    def _overdue(self, limit: int) -> list[int]:
        overdue = []
        for lease_id, (_, takes_before) in self._groups.items():
            if len(overdue) == limit or self._num_takes - takes_before < self._max_passed_over:
                break
            overdue.append(lease_id)
        return overdue

    def _pop_best(self) -> int:
        while (lease_id := heapq.heappop(self._best)[1]) not in self._groups:
            pass
        return lease_id

    def _pop_worst(self) -> int:
        while (lease_id := -heapq.heappop(self._worst)[1]) not in self._groups:
            pass
        return lease_id

    def _remove(self, lease_id: int) -> BufferedGroup:
        group, _ = self._groups.pop(lease_id)
        self._num_bytes -= group.num_bytes
        if len(self._best) > 2 * len(self._groups) + 64:
            self._best = [entry for entry in self._best if entry[1] in self._groups]
            heapq.heapify(self._best)
        if len(self._worst) > 2 * len(self._groups) + 64:
            self._worst = [entry for entry in self._worst if -entry[1] in self._groups]
            heapq.heapify(self._worst)
        return group
