"""The priority buffer: selection, eviction and staleness of groups.

Priority of a group = (p(1 - p))^w * decay^age, p its pass rate, w the signal weight, age = current
version - version of its oldest token. All groups age equally, so the order of two groups never
changes. w log(p(1 - p)) + oldest_version * log(1 / decay) is therefore a fixed key, and the heaps
need no rebuild.

Selection by p depends on the outcomes of the group itself. It biases the gradient if groups become
stale or are evicted, and not if it only changes when each group is trained (docs/algorithms.md).

One integer represents each group in four queues: a max-heap, a min-heap, the order of arrival, and
a list for each oldest version. A group that is removed from one queue leaves a stale integer in the
others, which is skipped. When most integers are stale, all queues are compacted. Queues with
removal at any position take more memory and time per group.
"""

import heapq
import math
import struct
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator

from speed_async.buffer.group_table import BufferedGroup, GroupTable

SIGNAL_FLOOR = 1e-6
"""Lower bound on p(1 - p), so that its log exists at a pass rate of 0 or 1."""
MIN_COMPACTION = 64
"""Number of removed groups up to which the queues are not compacted."""

_SLOT_BITS, _LEASE_BITS = 32, 64
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_SIGN = 1 << 63
_AS_FLOAT, _AS_INT = struct.Struct(">d"), struct.Struct(">Q")


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
        self._num_groups = 0
        self._num_bytes = 0
        self._num_tokens = 0
        self._num_removed = 0  # since the last compaction
        self._table = GroupTable()
        self._at: list[int] = []  # by slot: integer of its group, -1 for none
        self._best: list[int] = []
        self._worst: list[int] = []  # the same integers, negated
        self._arrived: deque[int] = deque()
        self._of_version: defaultdict[int, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return self._num_groups

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
        slot = self._table.add(group, self._num_takes - num_passed_over)
        number = self._number(group, slot)
        if slot == len(self._at):
            self._at.append(number)
        else:
            self._at[slot] = number
        self._num_groups += 1
        self._num_bytes += group.num_bytes
        self._num_tokens += group.num_tokens
        heapq.heappush(self._best, number)
        heapq.heappush(self._worst, -number)
        self._arrived.append(number)
        self._of_version[group.oldest_version].append(number)
        evicted = []
        while self._num_groups > self._capacity_groups or self._num_bytes > self._capacity_bytes:
            evicted.append(self._remove(self._pop_worst()))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        """Remove and return up to `num_groups` groups: first those passed over `max_passed_over`
        times, then by priority."""
        taken = []
        while len(taken) < num_groups and self._num_groups:
            number = self._pop_overdue()
            taken.append(self._remove(self._pop_best() if number is None else number))
        self._num_takes += 1
        return taken

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        """Remove and return every group with a token older than `oldest_version`, by version and
        then in order of arrival."""
        versions = sorted(version for version in self._of_version if version < oldest_version)
        numbers = [number for version in versions for number in self._of_version.pop(version)]
        return [self._remove(number) for number in numbers if self._is_present(number)]

    def waiting(self) -> Iterator[tuple[BufferedGroup, int]]:
        """Every group in order of arrival, with the number of takes that have passed it over."""
        for number in self._filter_present(self._arrived):
            slot = number & _SLOT_MASK
            yield self._table.read(slot), self._num_takes - self._table.num_takes_before(slot)

    def remove_where(self, unwanted: Callable[[BufferedGroup], bool]) -> list[BufferedGroup]:
        """Remove and return the groups that match. Takes O(n): for rare events only."""
        numbers = self._filter_present(self._arrived)
        return [self._remove(n) for n in numbers if unwanted(self._table.read(n & _SLOT_MASK))]

    def saved(self) -> list[tuple[BufferedGroup, int]]:
        """State for a snapshot. Groups in the journal are saved without their arrays."""
        return list(self.waiting())

    def load(self, groups: list[tuple[BufferedGroup, int]]) -> None:
        """Fill an empty buffer with `saved()`. Groups over capacity are evicted at the next
        insert."""
        bounds = self._capacity_groups, self._capacity_bytes
        self._capacity_groups = self._capacity_bytes = sys.maxsize
        for group, num_passed_over in groups:
            self.insert(group, num_passed_over=num_passed_over)
        self._capacity_groups, self._capacity_bytes = bounds

    # --- one integer per group ---------------------------------------------------------------

    def _number(self, group: BufferedGroup, slot: int) -> int:
        """Integer of a group; a smaller one is taken earlier. Fields, from the highest bits: key,
        lease id (of equal keys the oldest is taken first and evicted last), slot."""
        rank = _rank(-self._key(group))
        return ((rank << _LEASE_BITS | group.lease_id) << _SLOT_BITS) | slot

    def _key(self, group: BufferedGroup) -> float:
        signal = max(group.pass_rate * (1 - group.pass_rate), SIGNAL_FLOOR)
        return self._signal_weight * math.log(signal) + group.oldest_version * self._log_freshness

    def _is_present(self, number: int) -> bool:
        return self._at[number & _SLOT_MASK] == number

    def _pop_best(self) -> int:
        while not self._is_present(number := heapq.heappop(self._best)):
            pass
        return number

    def _pop_worst(self) -> int:
        while not self._is_present(number := -heapq.heappop(self._worst)):
            pass
        return number

    def _pop_overdue(self) -> int | None:
        """The oldest waiting group if it was passed over `max_passed_over` times; else None."""
        while not self._is_present(self._arrived[0]):
            self._arrived.popleft()
        before = self._table.num_takes_before(self._arrived[0] & _SLOT_MASK)
        overdue = self._num_takes - before >= self._max_passed_over
        return self._arrived.popleft() if overdue else None

    def _remove(self, number: int) -> BufferedGroup:
        slot = number & _SLOT_MASK
        group = self._table.pop(slot)
        self._at[slot] = -1
        self._num_groups -= 1
        self._num_bytes -= group.num_bytes
        self._num_tokens -= group.num_tokens
        self._num_removed += 1
        if self._num_removed > self._num_groups + MIN_COMPACTION:
            self._compact()
        return group

    def _compact(self) -> None:
        """Drop the integers of removed groups from all queues."""
        self._num_removed = 0
        self._arrived = deque(self._filter_present(self._arrived))
        self._best = self._filter_present(self._best)
        heapq.heapify(self._best)
        self._worst = [-number for number in self._best]
        heapq.heapify(self._worst)
        for version, numbers in list(self._of_version.items()):
            self._of_version[version] = self._filter_present(numbers)
            if not self._of_version[version]:
                del self._of_version[version]

    def _filter_present(self, numbers: Iterable[int]) -> list[int]:
        at, mask = self._at, _SLOT_MASK
        return [number for number in numbers if at[number & mask] == number]


def _rank(value: float) -> int:
    """Order-preserving map of a float to a 64-bit integer (IEEE 754 is sign and magnitude)."""
    bits = _AS_INT.unpack(_AS_FLOAT.pack(value + 0.0))[0]  # no negative zero
    return bits ^ (2 * _SIGN - 1) if bits & _SIGN else bits | _SIGN
