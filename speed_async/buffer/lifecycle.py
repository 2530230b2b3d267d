"""The lifecycle of every group, from its lease to its single end.

Owns the curriculum, the leases, the finished groups and the ledger. Each transition of a group
updates all four here, so they stay consistent.
"""

from dataclasses import dataclass, field

from speed_async.buffer.curriculum.curriculum import Curriculum
from speed_async.buffer.evaluation_budget import EvaluationBudget, EvaluationBudgetState
from speed_async.buffer.evaluations import Accuracy, EvaluationPlan, Evaluations
from speed_async.buffer.groups import FinishedGroups, GroupsState
from speed_async.buffer.leases import Credit, CreditState, LeasesState, LeaseTable, OpenLease
from speed_async.buffer.ledger import Ledger
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.buffer.reporting.unusable import UnusablePrompts
from speed_async.config.schema import Config
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats
from speed_async.types import GroupEnd, Lease, LeaseKind


@dataclass(kw_only=True, slots=True)
class LifecycleState:
    groups: GroupsState = field(default_factory=GroupsState)
    ledger: Ledger = field(default_factory=Ledger)
    leases: LeasesState = field(default_factory=LeasesState)
    credit: CreditState = field(default_factory=CreditState)
    evaluation_budget: EvaluationBudgetState = field(default_factory=EvaluationBudgetState)
    unusable: UnusablePrompts = field(default_factory=UnusablePrompts)


class Lifecycle:
    def __init__(
        self,
        config: Config,
        *,
        curriculum: Curriculum,
        evaluations: Evaluations,
        statistics: RunStatistics,
        state: LifecycleState,
    ) -> None:
        self.ledger = state.ledger
        self.leases = LeaseTable(state.leases)
        self.groups = FinishedGroups(config, self.ledger, statistics, state.groups)
        self.credit = Credit(
            config,
            leases=self.leases,
            ledger=self.ledger,
            buffer=self.groups.buffer,
            statistics=statistics,
            state=state.credit,
        )
        self.evaluation_budget = EvaluationBudget(
            config.evaluate.max_share, self.ledger, state.evaluation_budget
        )
        self.unusable = state.unusable
        self._curriculum = curriculum
        self._evaluations = evaluations
        self._statistics = statistics

    @property
    def is_exhausted(self) -> bool:
        """Whether no prompt is left to lease for training."""
        return self._curriculum.num_left == 0

    # --- granting --------------------------------------------------------------------------

    def credits_left(self, version_lag: int = 0) -> int:
        """Number of additional training leases that may be granted to an actor that samples with a
        version this far behind the newest."""
        return self.credit.left(len(self.groups.in_training), version_lag)

    def grant_training(
        self, holder: str, num_leases: int, now_s: float = 0.0, *, policy_version: int = 0
    ) -> m.Leases | None:
        """Grant an actor that samples with this version this many leases. Returns None if no prompt
        is left."""
        granted = [
            self.leases.grant(holder, prompt_id, now_s=now_s, policy_version=policy_version).lease
            for prompt_id in self._curriculum.choose(num_leases)
        ]
        return self._granted(holder, granted)

    def grant_evaluation(
        self,
        holder: str,
        plan: EvaluationPlan,
        max_leases: int,
        now_s: float = 0.0,
        *,
        is_bounded: bool = False,
    ) -> m.Leases | None:
        """Grant an actor up to `max_leases` prompts of an evaluation, charged to its budget if
        `is_bounded`. Returns None if there is nothing to grant."""
        granted: list[Lease] = []
        while len(granted) < max_leases and (prompt_id := plan.next_prompt()) is not None:
            entry = self.leases.grant(
                holder,
                prompt_id,
                suite=plan.suite,
                num_samples=plan.num_samples,
                now_s=now_s,
                reserved_tokens=self.evaluation_budget.reserve(plan.suite) if is_bounded else None,
            )
            granted.append(entry.lease)
        return self._granted(holder, granted)

    def _granted(self, holder: str, leases: list[Lease]) -> m.Leases | None:
        if not leases:
            return None
        for lease in leases:
            self.ledger.granted(holder, training=lease.kind is LeaseKind.TRAINING)
        return m.Leases(
            lease_ids=[lease.lease_id for lease in leases],
            prompt_ids=[lease.prompt_id for lease in leases],
            kind=str(leases[0].kind),
            suite=leases[0].suite,
            num_samples=leases[0].num_samples,
        )

    # --- results ---------------------------------------------------------------------------

    def group_finished(
        self,
        holder: str,
        message: m.GroupFinished,
        stats: GroupStats,
        place: tuple[int, int] | None = None,
    ) -> None:
        """Add a complete group, stored at `place` in the journal."""
        num_tokens = len(message.token_ids)
        entry = self._end_lease(holder, message.lease_id, num_tokens)
        if entry is None:
            return
        prompt_id = entry.lease.prompt_id
        self._statistics.screened(prompt_id, accepted=True, pass_rate=stats.unselected_pass_rate)
        self._curriculum.record(prompt_id, stats.num_passed, stats.num_completions)
        self._statistics.truncation["kept"].add(
            stats.num_completions, stats.num_truncated, stats.num_truncated_passed
        )
        num_bytes = 12 * num_tokens + 4 * len(message.prompt_token_ids)
        self.credit.record_group_size(num_bytes)
        self.groups.add(message, stats, place, num_bytes)

    def screened_out(self, holder: str, message: m.ScreenedOut) -> None:
        entry = self._end_lease(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return
        prompt_id = entry.lease.prompt_id
        self._curriculum.record(prompt_id, message.num_passed, message.num_completions)
        pass_rate = message.num_passed / max(message.num_completions, 1)
        self._statistics.screened(prompt_id, accepted=False, pass_rate=pass_rate)
        self._count_truncated("screened_out", message)
        self.ledger.ends[GroupEnd.SCREENED_OUT].add(message.num_tokens)

    def failed(self, holder: str, message: m.LeaseFailed) -> Accuracy | None:
        """A lease ended without a result.

        After a drain, the prompt is requeued. A prompt that failed would fail again, so it is
        skipped until its next epoch, and retired if the model cannot accept it. In an evaluation
        the completions of a prompt that the model cannot accept count as not passed, others as
        unscored. Returns the accuracy if this result completes the evaluation.
        """
        entry = self._end_lease(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return None
        training = entry.lease.kind is LeaseKind.TRAINING
        if training and message.reason == m.STALE:
            self.ledger.ends[GroupEnd.STALE].add(message.num_tokens)
            self._record_no_outcome(entry)
            return None
        if message.reason == m.DRAINED:
            self._count_without_result(entry, message.reason, message.num_tokens)
            self._requeue_prompt(entry)
            return None
        self._count_without_result(entry, message.reason, message.num_tokens)
        self._record_no_outcome(entry)
        kind, _, detail = message.reason.partition(": ")
        if kind == m.UNUSABLE:
            self.unusable.add(entry.lease.prompt_id, detail, suite=entry.lease.suite)
            if training:
                self._curriculum.retire(entry.lease.prompt_id)
        if training or entry.expired:
            return None
        plan = self._evaluations.of(entry.lease.suite)
        if plan.target_version is None:
            return None
        num_samples = entry.lease.num_samples
        if kind == m.UNUSABLE:
            return plan.record(0, num_samples, None, None)
        return plan.record(0, 0, None, None, num_unscored=num_samples)

    def evaluated(self, holder: str, message: m.Evaluated) -> Accuracy | None:
        entry = self._end_lease(holder, message.lease_id, message.num_tokens)
        if entry is None:
            return None
        self.ledger.evaluation.add(message.num_tokens)
        self._count_truncated("evaluated", message)
        if entry.expired:  # another lease covers its prompt
            return None
        has_tokens = message.num_tokens > 0
        return self._evaluations.of(entry.lease.suite).record(
            message.num_passed,
            message.num_completions - message.num_unscored,
            message.oldest_version if has_tokens else None,
            message.newest_version if has_tokens else None,
            num_unscored=message.num_unscored,
            num_truncated=message.num_truncated,
        )

    def expire(self, before_s: float) -> int:
        """Expire the leases granted before this time and requeue their prompts; returns their
        number."""
        expired = self.leases.expire(before_s)
        for entry in expired:
            self._requeue_prompt(entry)
        return len(expired)

    def holder_left(self, holder: str) -> None:
        """The actor sent Goodbye: leases in transit to it end unfinished."""
        for entry in self.leases.of_holder(holder):
            self.leases.end(entry.lease.lease_id)
            self._count_without_result(entry, m.DRAINED, 0)
            self._requeue_prompt(entry)

    def holder_lost(self, holder: str, reason: str = "") -> None:
        """The actor is lost: its leases end as failed, with the tokens that it last reported as
        in flight."""
        entries = self.leases.of_holder(holder)
        training = sum(entry.lease.kind is LeaseKind.TRAINING for entry in entries)
        for entry in entries:
            self.leases.end(entry.lease.lease_id)
            self._requeue_prompt(entry)
        self.ledger.mark_lost(holder, training, len(entries) - training, reason)

    # --- training --------------------------------------------------------------------------

    def trained(self, message: m.Trained) -> None:
        """An update is complete: its groups end, and stale groups leave the buffer."""
        self.groups.trained(message)
        self._curriculum.advance(message.policy_version)

    def resume_from(self, resumed: m.Resumed) -> None:
        """Continue from the learner's checkpoint after the journal lost its tail or the batches
        after that checkpoint. The ledger adopts the learner's counts."""
        if resumed.recent_lease_ids:
            self.leases.skip_past(max(resumed.recent_lease_ids))
        self.groups.resume_from(resumed)

    # --- ends ------------------------------------------------------------------------------

    def _end_lease(self, holder: str, lease_id: int, num_tokens: int) -> OpenLease | None:
        """End a lease. Returns None if it has already ended, so a resent result counts once."""
        if self.leases.held_by(holder, lease_id) is None:
            return None
        self.ledger.reported(holder, num_tokens)
        entry = self.leases.end(lease_id)
        if not entry.is_training:
            self.evaluation_budget.end(entry.lease.suite, num_tokens, entry.reserved_tokens)
        return entry

    def _count_without_result(self, entry: OpenLease, reason: str, num_tokens: int) -> None:
        training, is_drained = entry.lease.kind is LeaseKind.TRAINING, reason == m.DRAINED
        if training and is_drained:
            self.ledger.ends[GroupEnd.UNFINISHED].add(num_tokens)
        elif training:
            self.ledger.failed(reason, num_tokens)
        elif is_drained:  # the prompt is sampled again
            self.ledger.evaluation.add(num_tokens)
        else:
            self.ledger.held_out_failed(reason, num_tokens)

    def _count_truncated(self, end: str, message: m.ScreenedOut | m.Evaluated) -> None:
        self._statistics.truncation[end].add(
            message.num_completions, message.num_truncated, message.num_truncated_passed
        )

    def _record_no_outcome(self, entry: OpenLease) -> None:
        if entry.lease.kind is LeaseKind.TRAINING:
            self._curriculum.record(entry.lease.prompt_id, 0, 0)

    def _requeue_prompt(self, entry: OpenLease) -> None:
        if entry.expired:
            return  # requeued when the lease expired
        if entry.lease.kind is LeaseKind.TRAINING:
            self._curriculum.give_back(entry.lease.prompt_id)
        else:
            self._evaluations.of(entry.lease.suite).give_back(entry.lease.prompt_id)
