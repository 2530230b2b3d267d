"""The life of every group, from its lease to its one end.

Owns curriculum, leases, priority buffer and ledger, and keeps them in step: whatever happens to
a group happens here, once, in all four.
"""

from speed_async.buffer.credit import Credit
from speed_async.buffer.curriculum.curriculum import Curriculum
from speed_async.buffer.evaluations import Accuracy, Evaluations
from speed_async.buffer.group_table import BufferedGroup
from speed_async.buffer.leases import LeaseTable, OpenLease
from speed_async.buffer.ledger import Ledger
from speed_async.buffer.lineage import Lineage
from speed_async.buffer.priority import PriorityBuffer
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.reporting.unusable import UnusablePrompts
from speed_async.config.schema import Config
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.types import GroupEnd, LeaseKind


class Lifecycle:
    def __init__(
        self,
        config: Config,
        *,
        curriculum: Curriculum,
        evaluations: Evaluations,
        statistics: RunStatistics,
    ) -> None:
        self.ledger = Ledger()
        self.leases = LeaseTable()
        self.buffer = PriorityBuffer(
            capacity_groups=config.buffer.capacity_groups,
            capacity_bytes=config.buffer.capacity_bytes,
            freshness_decay=config.buffer.freshness_decay,
            max_passed_over=config.buffer.max_passed_over,
            signal_weight=config.buffer.signal_weight,
        )
        self.credit = Credit(
            config,
            leases=self.leases,
            ledger=self.ledger,
            buffer=self.buffer,
            statistics=statistics,
        )
        self.unusable = UnusablePrompts()
        self.in_training: dict[int, BufferedGroup] = {}
        self.lineage = Lineage()
        self._config = config
        self._curriculum = curriculum
        self._evaluations = evaluations
        self._statistics = statistics
        self._policy_version = 0

    @property
    def is_exhausted(self) -> bool:
        """No prompt is left that could be leased for training."""
        return self._curriculum.num_left == 0

    # --- granting --------------------------------------------------------------------------

    @property
    def credits_left(self) -> int:
        """Training leases that may still be granted."""
        return self.credit.left(len(self.in_training))

    def grant(self, holder: str, kind: LeaseKind, most: int, now_s: float = 0.0) -> m.Leases | None:
        """Up to `most` new leases for an actor, or None when there is nothing to grant."""
        training = kind is LeaseKind.TRAINING
        give = self._training if training else self._evaluation
        granted = give(holder, most, now_s)
        if not granted:
            return None
        for _ in granted:
            self.ledger.granted(holder, training=training)
        return m.Leases(
            lease_ids=[entry.lease.lease_id for entry in granted],
            prompt_ids=[entry.lease.prompt_id for entry in granted],
            kind=str(kind),
            num_samples=granted[0].lease.num_samples,
        )

    def _training(self, holder: str, most: int, now_s: float) -> list[OpenLease]:
        return [
            self.leases.grant(holder, prompt_id, LeaseKind.TRAINING, now_s=now_s)
            for prompt_id in self._curriculum.choose(min(most, self.credits_left))
        ]

    def _evaluation(self, holder: str, most: int, now_s: float) -> list[OpenLease]:
        granted = []
        samples = self._evaluations.num_samples
        while len(granted) < most and (prompt_id := self._evaluations.next_prompt()) is not None:
            kind = LeaseKind.EVALUATION
            granted.append(self.leases.grant(holder, prompt_id, kind, samples, now_s=now_s))
        return granted

    # --- results ---------------------------------------------------------------------------

    def group_finished(
        self,
        holder: str,
        message: m.GroupFinished,
        facts: GroupStats,
        place: tuple[int, int] | None = None,
    ) -> None:
        """Take in a full group, which lies at `place` in the journal."""
        num_tokens = len(message.token_ids)
        entry = self._close(holder, message.lease_id, num_tokens)
        if entry is None:
            return
        prompt_id = entry.lease.prompt_id
        self._statistics.screened(prompt_id, accepted=True, pass_rate=facts.unselected_pass_rate)
        self._curriculum.record(prompt_id, facts.num_passed, facts.num_completions)
        num_bytes = 12 * num_tokens + 4 * len(message.prompt_token_ids)
        self.credit.weighed(num_bytes)
        capacity = self._config.buffer.capacity_bytes
        spilled = place is not None and self._config.buffer.spill
        spilled = spilled and self.buffer.num_bytes + num_bytes > capacity
        buffered = BufferedGroup(
            message=None if spilled else message,
            lease_id=message.lease_id,
            place=place,
            pass_rate=facts.pass_rate,
            oldest_version=facts.oldest_version,
            mean_version=facts.mean_version,
            num_tokens=num_tokens,
            num_bytes=0 if spilled else num_bytes,
        )
        if buffered.oldest_version < self._oldest_allowed:
            self.ledger.ends[GroupEnd.STALE].add(num_tokens)
            return
        self.ledger.buffered.add(num_tokens)
        for evicted in self.buffer.insert(buffered):
            self._leave_buffer(evicted, GroupEnd.EVICTED)

    def screened_out(self, holder: str, message: m.ScreenedOut) -> None:
        entry = self._close(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return
        prompt_id = entry.lease.prompt_id
        self._curriculum.record(prompt_id, message.num_passed, message.num_completions)
        pass_rate = message.num_passed / max(message.num_completions, 1)
        self._statistics.screened(prompt_id, accepted=False, pass_rate=pass_rate)
        self.ledger.ends[GroupEnd.SCREENED_OUT].add(message.num_tokens)

    def failed(self, holder: str, message: m.LeaseFailed) -> Accuracy | None:
        """A lease without a result. Only a drain says nothing about the prompt, which then is
        offered again; a prompt that fails would fail again, so it waits for its next epoch, or for
        ever when the model cannot take it, and in an evaluation it counts as not passed (then this
        may be the one that completes it)."""
        entry = self._close(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return None
        training = entry.lease.kind is LeaseKind.TRAINING
        if training and message.reason == m.STALE:
            self.ledger.ends[GroupEnd.STALE].add(message.num_tokens)
            self._learn_nothing(entry)
            return None
        if message.reason == m.DRAINED:
            self._without_result(entry, message.reason, message.num_tokens)
            self._offer_again(entry)
            return None
        self._without_result(entry, message.reason, message.num_tokens)
        self._learn_nothing(entry)
        kind, _, why = message.reason.partition(": ")
        if kind == m.UNUSABLE:
            self.unusable.add(entry.lease.prompt_id, why, training=training)
            if training:
                self._curriculum.retire(entry.lease.prompt_id)
        version = self._evaluations.target_version
        if training or version is None or entry.expired:
            return None
        return self._evaluations.record(0, entry.lease.num_samples, None, None)

    def evaluated(self, holder: str, message: m.Evaluated) -> Accuracy | None:
        entry = self._close(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return None
        self.ledger.evaluation.add(message.num_tokens)
        if entry.expired:  # its prompt was given to another
            return None
        has_tokens = message.num_tokens > 0
        return self._evaluations.record(
            message.num_passed,
            message.num_completions,
            message.oldest_version if has_tokens else None,
            message.newest_version if has_tokens else None,
        )

    def expire(self, before_s: float) -> int:
        """Offer again the prompts of leases granted before this; returns how many there were."""
        late = self.leases.expire(before_s)
        for entry in late:
            self._offer_again(entry)
        return len(late)

    def holder_left(self, holder: str) -> None:
        """The actor said goodbye: leases still on their way to it end unfinished."""
        for entry in self.leases.of_holder(holder):
            self.leases.end(entry.lease.lease_id)
            self._without_result(entry, m.DRAINED, 0)
            self._offer_again(entry)

    def holder_lost(self, holder: str, why: str = "") -> None:
        """The actor died: its leases end as failed, with the tokens it last said to hold."""
        entries = self.leases.of_holder(holder)
        training = sum(entry.lease.kind is LeaseKind.TRAINING for entry in entries)
        for entry in entries:
            self.leases.end(entry.lease.lease_id)
            self._offer_again(entry)
        self.ledger.lose(holder, training, len(entries) - training, why)

    # --- training --------------------------------------------------------------------------

    def take(self, num_groups: int) -> list[BufferedGroup] | None:
        """A whole batch, or None while there are too few groups."""
        if len(self.buffer) < num_groups:
            return None
        taken = self.buffer.take(num_groups)
        for group in taken:
            self.ledger.buffered.add(-group.num_tokens, -1)
            self.ledger.taken.add(group.num_tokens)
            self.in_training[group.lease_id] = group
        self._statistics.batch_taken(taken, self._policy_version)
        return taken

    def is_training(self, lease_ids: list[int]) -> bool:
        """Whether the learner has these groups, for the first time."""
        return all(lease_id in self.in_training for lease_id in lease_ids)

    def trained(self, message: m.Trained) -> None:
        """An update is done; its groups end, and those grown too old leave the buffer."""
        groups = [self.in_training.pop(lease_id) for lease_id in message.lease_ids]
        for group in groups:
            self.ledger.taken.add(-group.num_tokens, -1)
            if message.skipped:
                self.ledger.failed("non-finite update", group.num_tokens)
            else:
                self.ledger.ends[GroupEnd.TRAINED].add(group.num_tokens)
        self.lineage.trained(message, groups)
        learner = self.ledger.learner_trained
        learner.groups, learner.tokens = message.groups_trained, message.tokens_trained
        self._policy_version = message.policy_version
        self._curriculum.advance(message.policy_version)
        self._drop_stale()

    # --- another life of the run -------------------------------------------------------------

    def return_untrained(self) -> None:
        """The learner died over these groups, and no checkpoint can hold them: offered again."""
        for group in self.in_training.values():
            self.ledger.taken.add(-group.num_tokens, -1)
            self.ledger.buffered.add(group.num_tokens)
            for evicted in self.buffer.insert(group):
                self._leave_buffer(evicted, GroupEnd.EVICTED)
        self.in_training.clear()

    def adopt(self, resumed: m.Resumed) -> None:
        """Go on where the learner stands, though the journal tells another story: its tail, or
        the batches after that checkpoint, were lost. The books follow the learner."""
        known = set(resumed.recent_lease_ids)
        for group in self.buffer.remove_where(lambda group: group.lease_id in known):
            self._leave_buffer(group, GroupEnd.TRAINED)
        if resumed.recent_lease_ids:
            self.leases.skip_past(max(known))
        version = resumed.policy_version
        for group in self.buffer.remove_where(lambda group: group.mean_version > version):
            self._leave_buffer(group, GroupEnd.STALE)
        self.ledger.follow_learner(resumed.groups_trained, resumed.tokens_trained)
        self.lineage.clear()
        self._policy_version = resumed.policy_version
        self._drop_stale()

    def _drop_stale(self) -> None:
        for group in self.buffer.drop_older_than(self._oldest_allowed):
            self._leave_buffer(group, GroupEnd.STALE)

    @property
    def needed_segments(self) -> set[int]:
        """Journal segments in which a group lies that still counts."""
        groups = [group for group, _ in self.buffer.waiting()]
        groups += self.in_training.values()
        groups += self.lineage.groups
        return {group.place[0] for group in groups if group.place is not None}

    @property
    def _oldest_allowed(self) -> int:
        return self._policy_version - self._config.buffer.max_staleness

    # --- ends ------------------------------------------------------------------------------

    def _close(self, holder: str, lease_id: int, num_tokens: int) -> OpenLease | None:
        """End a lease; None when it had ended before, so a resent result counts once."""
        if self.leases.held_by(holder, lease_id) is None:
            return None
        self.ledger.reported(holder, num_tokens)
        return self.leases.end(lease_id)

    def _leave_buffer(self, group: BufferedGroup, end: GroupEnd) -> None:
        self.ledger.buffered.add(-group.num_tokens, -1)
        self.ledger.ends[end].add(group.num_tokens)

    def _without_result(self, entry: OpenLease, reason: str, num_tokens: int) -> None:
        training, is_drained = entry.lease.kind is LeaseKind.TRAINING, reason == m.DRAINED
        if training and is_drained:
            self.ledger.ends[GroupEnd.UNFINISHED].add(num_tokens)
        elif training:
            self.ledger.failed(reason, num_tokens)
        elif is_drained:  # its prompt is sampled again
            self.ledger.evaluation.add(num_tokens)
        else:
            self.ledger.held_out_failed(reason, num_tokens)

    def _learn_nothing(self, entry: OpenLease) -> None:
        if entry.lease.kind is LeaseKind.TRAINING:
            self._curriculum.record(entry.lease.prompt_id, 0, 0)

    def _offer_again(self, entry: OpenLease) -> None:
        if entry.expired:
            return  # it was, when it expired
        if entry.lease.kind is LeaseKind.TRAINING:
            self._curriculum.give_back(entry.lease.prompt_id)
        else:
            self._evaluations.give_back(entry.lease.prompt_id)
