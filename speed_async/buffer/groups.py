"""Finished groups from their arrival to their end: buffered, in training, trained or stale."""

from dataclasses import dataclass, field

from speed_async.buffer.ledger import Ledger
from speed_async.buffer.lineage import Lineage
from speed_async.buffer.priority import BufferedGroup, BufferState, PriorityBuffer
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.config.schema import Config
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.types import GroupEnd


@dataclass(kw_only=True, slots=True)
class GroupsState:
    policy_version: int = 0
    """Newest trained version."""
    buffer: BufferState = field(default_factory=BufferState)
    in_training: dict[int, BufferedGroup] = field(default_factory=dict)
    """Groups that the learner holds, by lease."""
    lineage: Lineage = field(default_factory=Lineage)


class FinishedGroups:
    def __init__(
        self, config: Config, ledger: Ledger, statistics: RunStatistics, state: GroupsState
    ) -> None:
        self.buffer = PriorityBuffer(
            capacity_groups=config.capacity_groups,
            capacity_bytes=config.buffer.capacity_bytes,
            by_signal=config.takes_by_signal,
            state=state.buffer,
        )
        self.in_training = state.in_training
        """Groups that the learner holds, by lease."""
        self.lineage = state.lineage
        self._state = state
        self._config = config.buffer
        self._ledger = ledger
        self._statistics = statistics

    @property
    def policy_version(self) -> int:
        """Newest trained version."""
        return self._state.policy_version

    def add(
        self,
        message: m.GroupFinished,
        stats: GroupStats,
        place: tuple[int, int] | None,
        num_bytes: int,
    ) -> None:
        """Buffer a group, stored at `place` in the journal, unless it is stale."""
        num_tokens = len(message.token_ids)
        capacity = self._config.capacity_bytes
        spilled = place is not None and self._config.spill
        spilled = spilled and self.buffer.num_bytes + num_bytes > capacity
        buffered = BufferedGroup(
            message=None if spilled else message,
            lease_id=message.lease_id,
            place=place,
            pass_rate=stats.pass_rate,
            oldest_version=stats.oldest_version,
            mean_version=stats.mean_version,
            num_tokens=num_tokens,
            num_bytes=0 if spilled else num_bytes,
        )
        if buffered.oldest_version < self._oldest_allowed:
            self._ledger.ends[GroupEnd.STALE].add(num_tokens)
            return
        self._ledger.buffered.add(num_tokens)
        for evicted in self.buffer.insert(buffered):
            self._leave_buffer(evicted, GroupEnd.EVICTED)

    def take(self, num_groups: int) -> list[BufferedGroup] | None:
        """Take a full batch from the buffer. Returns None if it holds too few groups."""
        if len(self.buffer) < num_groups:
            return None
        taken = self.buffer.take(num_groups)
        for group in taken:
            self._ledger.buffered.add(-group.num_tokens, -1)
            self._ledger.taken.add(group.num_tokens)
            self.in_training[group.lease_id] = group
        self._statistics.batch_taken(taken, self.policy_version)
        return taken

    def is_training(self, lease_ids: list[int]) -> bool:
        """Whether the learner holds all these groups and has not trained them yet."""
        return all(lease_id in self.in_training for lease_id in lease_ids)

    def trained(self, message: m.Trained) -> None:
        """An update is complete: its groups end, and stale groups leave the buffer."""
        groups = [self.in_training.pop(lease_id) for lease_id in message.lease_ids]
        for group in groups:
            self._ledger.taken.add(-group.num_tokens, -1)
            if message.skipped:
                self._ledger.failed("non-finite update", group.num_tokens)
            else:
                self._ledger.ends[GroupEnd.TRAINED].add(group.num_tokens)
        self.lineage.trained(message, groups)
        learner = self._ledger.learner_trained
        learner.groups, learner.tokens = message.groups_trained, message.tokens_trained
        self._state.policy_version = message.policy_version
        self._drop_stale()

    def return_untrained(self) -> None:
        """Return the groups in training to the buffer: the learner failed before their update, so
        no checkpoint includes them."""
        for group in self.in_training.values():
            self._ledger.taken.add(-group.num_tokens, -1)
            self._ledger.buffered.add(group.num_tokens)
            for evicted in self.buffer.insert(group):
                self._leave_buffer(evicted, GroupEnd.EVICTED)
        self.in_training.clear()

    def resume_from(self, resumed: m.Resumed) -> None:
        """Continue from the learner's checkpoint after the journal lost its tail or the batches
        after that checkpoint. The ledger adopts the learner's counts."""
        known = set(resumed.recent_lease_ids)
        for group in self.buffer.remove_where(lambda group: group.lease_id in known):
            self._leave_buffer(group, GroupEnd.TRAINED)
        version = resumed.policy_version
        for group in self.buffer.remove_where(lambda group: group.mean_version > version):
            self._leave_buffer(group, GroupEnd.STALE)
        self._ledger.reconcile_with_learner(resumed.groups_trained, resumed.tokens_trained)
        self.lineage.clear()
        self._state.policy_version = resumed.policy_version
        self._drop_stale()

    def _drop_stale(self) -> None:
        for group in self.buffer.drop_older_than(self._oldest_allowed):
            self._leave_buffer(group, GroupEnd.STALE)

    @property
    def needed_segments(self) -> set[int]:
        """Journal segments that hold a group that may still be read."""
        groups = list(self.buffer.waiting())
        groups += self.in_training.values()
        groups += self.lineage.groups
        return {group.place[0] for group in groups if group.place is not None}

    @property
    def _oldest_allowed(self) -> int:
        return self.policy_version - self._config.max_staleness

    def _leave_buffer(self, group: BufferedGroup, end: GroupEnd) -> None:
        self._ledger.buffered.add(-group.num_tokens, -1)
        self._ledger.ends[end].add(group.num_tokens)
