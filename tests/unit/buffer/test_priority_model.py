"""The priority buffer against a reference implementation that scans a list."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from speed_async.buffer.priority import SIGNAL_FLOOR, BufferedGroup, PriorityBuffer


class NaiveBuffer:
    """Groups in order of arrival, each with the number of takes before it."""

    def __init__(
        self, groups: int, num_bytes: int, decay: float, passed_over: int, weight: float
    ) -> None:
        self.capacity_groups, self.capacity_bytes = groups, num_bytes
        self.decay, self.max_passed_over, self.weight = decay, passed_over, weight
        self.num_takes = 0
        self.entries: list[tuple[BufferedGroup, int]] = []

    @property
    def groups(self) -> list[BufferedGroup]:
        return [group for group, _ in self.entries]

    def order(self, group: BufferedGroup) -> tuple[float, int]:
        signal = max(group.pass_rate * (1 - group.pass_rate), SIGNAL_FLOOR)
        key = self.weight * math.log(signal) + group.oldest_version * -math.log(self.decay)
        return -key, group.lease_id

    def insert(self, group: BufferedGroup, num_passed_over: int) -> list[BufferedGroup]:
        self.entries.append((group, self.num_takes - num_passed_over))
        evicted = []
        while len(self.entries) > self.capacity_groups or (
            sum(group.num_bytes for group in self.groups) > self.capacity_bytes
        ):
            evicted.append(self.remove(max(self.groups, key=self.order)))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        overdue = []
        for group, before in self.entries:
            if self.num_takes - before < self.max_passed_over:
                break
            overdue.append(group)
        taken = [self.remove(group) for group in overdue[:num_groups]]
        rest = sorted(self.groups, key=self.order)[: num_groups - len(taken)]
        self.num_takes += 1
        return taken + [self.remove(group) for group in rest]

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        old = [group for group in self.groups if group.oldest_version < oldest_version]
        return [self.remove(g) for g in sorted(old, key=lambda group: group.oldest_version)]

    def remove(self, group: BufferedGroup) -> BufferedGroup:
        self.entries = [entry for entry in self.entries if entry[0] is not group]
        return group


class TwoBuffers(RuleBasedStateMachine):
    @initialize(
        groups=st.integers(1, 12),
        num_bytes=st.integers(0, 600),
        decay=st.sampled_from([0.5, 1.0]),
        passed_over=st.integers(1, 4),
        weight=st.sampled_from([0.0, 1.0]),
        lease_ids=st.permutations(range(300)),
    )
    def open(
        self,
        groups: int,
        num_bytes: int,
        decay: float,
        passed_over: int,
        weight: float,
        lease_ids: list[int],
    ) -> None:
        self.lease_ids = lease_ids
        self.naive = NaiveBuffer(groups, num_bytes, decay, passed_over, weight)
        self.buffer = PriorityBuffer(
            capacity_groups=groups,
            capacity_bytes=num_bytes,
            freshness_decay=decay,
            max_passed_over=passed_over,
            signal_weight=weight,
        )

    @rule(
        num_passed=st.integers(0, 4),
        version=st.integers(0, 5),
        num_tokens=st.integers(1, 9),
        num_bytes=st.integers(0, 200),
        place=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 2**40)),
        num_passed_over=st.just(0) | st.integers(0, 3),
        times=st.integers(1, 20),
    )
    def insert(
        self,
        num_passed: int,
        version: int,
        num_tokens: int,
        num_bytes: int,
        place: tuple[int, int] | None,
        num_passed_over: int,
        times: int,
    ) -> None:
        for _, before in self.naive.entries[-1:]:  # not more than an older group
            num_passed_over = min(num_passed_over, self.naive.num_takes - before)
        for _ in range(min(times, len(self.lease_ids))):
            group = BufferedGroup(
                message=None,
                lease_id=self.lease_ids.pop(),
                pass_rate=num_passed / 4,
                oldest_version=version,
                mean_version=version + 0.25,
                num_tokens=num_tokens,
                num_bytes=num_bytes,
                place=place,
            )
            evicted = self.naive.insert(group, num_passed_over)
            assert self.buffer.insert(group, num_passed_over=num_passed_over) == evicted

    @rule(num_groups=st.integers(0, 6))
    def take(self, num_groups: int) -> None:
        assert self.buffer.take(num_groups) == self.naive.take(num_groups)

    @rule(oldest_version=st.integers(0, 6))
    def drop(self, oldest_version: int) -> None:
        dropped = self.naive.drop_older_than(oldest_version)
        assert self.buffer.drop_older_than(oldest_version) == dropped

    @invariant()
    def contents_match(self) -> None:
        if not hasattr(self, "buffer"):
            return
        groups = self.naive.groups
        assert len(self.buffer) == len(groups)
        assert self.buffer.num_tokens == sum(group.num_tokens for group in groups)
        assert self.buffer.num_bytes == sum(group.num_bytes for group in groups)
        takes = self.naive.num_takes
        waiting = [(group, takes - before) for group, before in self.naive.entries]
        assert list(self.buffer.waiting()) == waiting


TwoBuffers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_buffer_matches_the_naive_buffer = TwoBuffers.TestCase
