"""The learner's batch request, and the distribution of the leases that fill it.

Batches decides which leases a request permits, when it completes and how long it waits; Grants
distributes the leases among the actors; handlers/learner.py sends the batch.

With `run.overlap`, actors generate whatever the credits allow. A request completes as soon as its
batch is full and no late group remains: one that is still being generated, and that the update
would make stale. To drop it instead would favor short completions. Without `run.overlap`,
generation and training alternate. Prompts are granted only while the learner waits, in rounds large
enough to fill the batch, and the request completes when the round has finished and no lease is in
flight. Surplus groups of a round stay buffered for the next batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from speed_async.buffer.evaluations import EvaluationPlan, Evaluations
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState, Membership
from speed_async.buffer.priority import BufferedGroup
from speed_async.config.schema import Config
from speed_async.transport.messages import BatchPending, Leases, TakeBatch

MAX_LATE_SHARE = 0.5
"""Share of `cluster.stall_timeout_s` that a batch waits at most for late groups."""
ROUND_MARGIN = 1.15
"""Factor by which a round exceeds the size that the acceptance rate implies, since a second round
costs more."""
NOTICES_PER_TIMEOUT = 4
"""Messages to a waiting learner within `cluster.stall_timeout_s`."""


@dataclass(kw_only=True, slots=True)
class BatchesState:
    request: TakeBatch | None = None
    """The open request."""
    requested_s: float = 0.0
    round_left: int = 0
    """Leases of the current round that are not granted yet."""
    starved_s: float = 0.0
    """Time that the last batch waited for groups."""
    short_s: float = 0.0
    """When the open request last waited for something else than late groups."""
    late_s: float = 0.0
    """Time that the last batch waited although the buffer could fill it."""
    told_s: float = 0.0
    """When the learner was last told that its request is open."""
    tokens: int = 0
    """Generated tokens of all actors, and when their number last increased, below."""
    tokens_s: float = 0.0
    num_usable: int = 0
    """Groups that entered the buffer, and when their number last increased, below."""
    usable_s: float = 0.0
    num_rejected: int = 0
    """Groups that had ended without entering the buffer at `usable_s`."""


class Batches:
    def __init__(
        self, config: Config, lifecycle: Lifecycle, membership: Membership, state: BatchesState
    ) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._membership = membership
        self._state = state

    @property
    def starved_s(self) -> float:
        """Time that the last batch waited for groups."""
        return self._state.starved_s

    @property
    def late_s(self) -> float:
        """Time that the last batch waited for groups that its update would have made stale,
        although the buffer could fill it."""
        return self._state.late_s

    def request(self, take: TakeBatch, now_s: float) -> None:
        state = self._state
        state.request, state.requested_s, state.told_s = take, now_s, now_s
        state.tokens_s = state.usable_s = now_s
        state.num_rejected = self._lifecycle.ledger.num_rejected

    def cancel(self) -> None:
        self._state.request, self._state.round_left = None, 0

    def num_grantable(self, version_lag: int = 0) -> int:
        """Training leases that may be granted now to an actor that samples with a version this far
        behind the newest."""
        credits_left = self._lifecycle.credits_left(version_lag)
        if self._config.run.overlap:
            return credits_left
        if self._state.request is None:
            return 0
        missing = self._state.request.num_groups - len(self._lifecycle.groups.buffer)
        if not self._state.round_left and missing > 0 and not self._lifecycle.leases.num_charged:
            self._state.round_left = self._round_size(missing)
        return min(self._state.round_left, credits_left)

    def granted(self, num_leases: int) -> None:
        self._state.round_left = max(0, self._state.round_left - num_leases)

    def _round_size(self, missing: int) -> int:
        if self._config.gate.mode == "off":
            return missing
        return math.ceil(missing * ROUND_MARGIN / self._lifecycle.credit.credits_per_prompt)

    def poll(
        self, now_s: float, *, evaluating: bool
    ) -> tuple[TakeBatch, list[BufferedGroup]] | None:
        """The request and its groups once the batch is ready; None before that."""
        if self._state.request is None:
            return None
        has_few = len(self._lifecycle.groups.buffer) < self._state.request.num_groups
        is_round = evaluating or self._lifecycle.leases.num_charged
        if has_few or (is_round and not self._config.run.overlap):
            self._state.short_s = now_s
            return None
        if self._waits_for_late_groups(now_s):
            return None
        groups = self._lifecycle.groups.take(self._state.request.num_groups)
        if groups is None:
            return None
        take = self._state.request
        self._state.starved_s = now_s - self._state.requested_s
        self._state.late_s = now_s - max(self._state.requested_s, self._state.short_s)
        self.cancel()
        return take, groups

    def _waits_for_late_groups(self, now_s: float) -> bool:
        """Whether the update would make a group stale that is still being generated, by an actor
        that has made a token within the deadline of a broadcast."""
        if self._config.buffer.late_groups == "drop":
            return False
        oldest = self._lifecycle.leases.oldest_version
        next_version = self._lifecycle.groups.policy_version + 1
        first_usable = next_version - self._config.buffer.max_staleness
        if oldest is None or oldest >= first_usable:
            return False
        waited_s = now_s - self._state.requested_s
        if waited_s >= MAX_LATE_SHARE * self._config.cluster.stall_timeout_s:
            return False
        late = self._lifecycle.leases.holders(before_version=first_usable)
        silent_s = now_s - self._config.weights.deadline_s
        return any(
            actor.progress_s > silent_s
            for actor in self._membership.present()
            if actor.name in late
        )

    def pending(self, now_s: float) -> list[BatchPending]:
        """Tells the learner, several times within its own deadline, that its request is open."""
        interval_s = self._config.cluster.stall_timeout_s / NOTICES_PER_TIMEOUT
        if self._state.request is None or now_s - self._state.told_s < interval_s:
            return []
        self._state.told_s = now_s
        return [BatchPending()]

    def stalled(self, now_s: float, *, is_starting: bool) -> str:
        """Why the request cannot be filled; empty while there is progress.

        No new token for `stall_timeout_s` is a stall, however long the completions are. So is a
        whole window of prompts (`max_credits`) of which none entered the buffer, if it took that
        long. `is_starting`: no actor has loaded its model yet; the engine bounds that itself.
        """
        state, ledger = self._state, self._lifecycle.ledger
        if state.request is None:
            return ""
        if ledger.tokens_generated > state.tokens:
            state.tokens_s = now_s
        if (num_usable := ledger.num_usable) > state.num_usable:
            state.usable_s, state.num_rejected = now_s, ledger.num_rejected
        state.tokens, state.num_usable = ledger.tokens_generated, num_usable
        limit_s = self._config.cluster.stall_timeout_s
        start_s = self._config.cluster.connect_timeout_s if is_starting else 0.0
        if now_s - state.tokens_s >= limit_s + start_s:
            return f"no token was generated for {now_s - state.tokens_s:.0f} s"
        num_rejected = ledger.num_rejected - state.num_rejected
        if now_s - state.usable_s >= limit_s and num_rejected >= self._config.max_credits:
            return (
                f"none of the last {num_rejected} prompts entered the buffer, for "
                f"{now_s - state.usable_s:.0f} s"
            )
        return ""

    def waited_s(self, now_s: float) -> float | None:
        """Time that the learner has waited for a batch; None without an open request."""
        return None if self._state.request is None else now_s - self._state.requested_s


class Grants:
    """Distributes leases among the actors that want work.

    Evaluations precede training. `evaluate.max_share` bounds them (evaluation_budget.py), except
    the first evaluation of a suite, evaluations when training is over, and those of runs without
    `run.overlap`, whose updates wait for them.
    """

    def __init__(
        self, config: Config, lifecycle: Lifecycle, batches: Batches, evaluations: Evaluations
    ) -> None:
        self._overlap = config.run.overlap
        self._slack = config.buffer.max_staleness if config.run.overlap else 0
        self._lifecycle = lifecycle
        self._batches = batches
        self._evaluations = evaluations

    def next(
        self, present: Sequence[ActorState], policy_version: int, now_s: float, *, training: bool
    ) -> Iterator[tuple[str, Leases]]:
        """All leases that may be granted now. Evaluation leases go to actors that hold the
        evaluated version. Training leases go, in equal shares, to actors within the staleness
        bound."""
        if not any(state.want for state in present):
            return
        plans = self._evaluations.leasable()
        if not plans and not (training and self._batches.num_grantable() > 0):
            return
        ready = [state for state in present if not (state.leaving or state.awaits_weights)]
        for plan in plans:
            is_bounded = training and self._overlap and plan.evaluated_version is not None
            yield from self._grant_evaluation(plan, ready, now_s, is_bounded=is_bounded)
            if is_bounded and plan.has_pending:
                break  # a later evaluation with shorter leases would use up the budget
        if not training:
            return
        oldest = policy_version - self._slack
        fresh = [state for state in ready if state.applied_version >= oldest]
        fresh.sort(key=lambda state: -state.want)
        for position, state in enumerate(fresh):
            if not state.want:
                break
            num_grantable = self._batches.num_grantable(policy_version - state.applied_version)
            share = math.ceil(num_grantable / (len(fresh) - position))
            if share < 1:
                continue
            count = min(state.want, share)
            leases = self._lifecycle.grant_training(
                state.name, count, now_s, policy_version=state.applied_version
            )
            if leases is not None:
                state.want -= len(leases.lease_ids)
                self._batches.granted(len(leases.lease_ids))
                yield state.name, leases

    def _grant_evaluation(
        self, plan: EvaluationPlan, ready: Sequence[ActorState], now_s: float, *, is_bounded: bool
    ) -> Iterator[tuple[str, Leases]]:
        for state in ready:
            if not state.want or state.applied_version < (plan.target_version or 0):
                continue
            count = state.want
            if is_bounded:
                count = min(count, self._lifecycle.evaluation_budget.num_leases(plan.suite))
            leases = self._lifecycle.grant_evaluation(
                state.name, plan, count, now_s, is_bounded=is_bounded
            )
            if leases is not None:
                state.want -= len(leases.lease_ids)
                yield state.name, leases
