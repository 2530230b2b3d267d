"""The priority buffer against a reference implementation that scans a list."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from speed_async.buffer.priority import BufferedGroup, PriorityBuffer


class NaiveBuffer:
    """Groups in order of arrival."""

    def __init__(self, groups: int, num_bytes: int, *, by_signal: bool) -> None:
        self.capacity_groups, self.capacity_bytes = groups, num_bytes
        self.by_signal = by_signal
        self.groups: list[BufferedGroup] = []

    def order(self, group: BufferedGroup) -> tuple[float, ...]:
        signal = group.pass_rate * (1 - group.pass_rate) * self.by_signal
        return group.oldest_version, -signal, group.lease_id

    def insert(self, group: BufferedGroup) -> list[BufferedGroup]:
        self.groups.append(group)
        evicted = []
        while len(self.groups) > self.capacity_groups or (
            sum(group.num_bytes for group in self.groups) > self.capacity_bytes
        ):
            evicted.append(self.remove(max(self.groups, key=self.order)))
        return evicted

    def take(self, num_groups: int) -> list[BufferedGroup]:
        return [self.remove(g) for g in sorted(self.groups, key=self.order)[:num_groups]]

    def drop_older_than(self, oldest_version: int) -> list[BufferedGroup]:
        old = [group for group in self.groups if group.oldest_version < oldest_version]
        return [self.remove(g) for g in sorted(old, key=lambda group: group.oldest_version)]

    def remove(self, group: BufferedGroup) -> BufferedGroup:
        self.groups = [each for each in self.groups if each is not group]
        return group


class TwoBuffers(RuleBasedStateMachine):
    @initialize(
        groups=st.integers(1, 12),
        num_bytes=st.integers(0, 600),
        by_signal=st.booleans(),
        lease_ids=st.permutations(range(300)),
    )
    def open(
        self,
        groups: int,
        num_bytes: int,
        by_signal: bool,
        lease_ids: list[int],
    ) -> None:
        self.lease_ids = lease_ids
        self.naive = NaiveBuffer(groups, num_bytes, by_signal=by_signal)
        self.buffer = PriorityBuffer(
            capacity_groups=groups, capacity_bytes=num_bytes, by_signal=by_signal
        )

    @rule(
        num_passed=st.integers(0, 4),
        version=st.integers(0, 5),
        num_tokens=st.integers(1, 9),
        num_bytes=st.integers(0, 200),
        place=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 2**40)),
        times=st.integers(1, 20),
    )
    def insert(
        self,
        num_passed: int,
        version: int,
        num_tokens: int,
        num_bytes: int,
        place: tuple[int, int] | None,
        times: int,
    ) -> None:
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
            assert self.buffer.insert(group) == self.naive.insert(group)

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
        assert list(self.buffer.waiting()) == groups


TwoBuffers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_buffer_matches_the_naive_buffer = TwoBuffers.TestCase
