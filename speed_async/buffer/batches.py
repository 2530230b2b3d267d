"""The learner's batch request, and the distribution of the leases that fill it.

Batches decides which leases a request permits, when it completes and how long it waits; Grants
distributes the leases among the actors; handlers/learner.py sends the batch.

With `run.overlap`, actors generate whatever the credits allow, and a request completes as soon as
its batch is full. Without it, generation and training alternate. Prompts are granted only while
the learner waits, in rounds large enough to fill the batch, and the request completes when the
round has finished and no lease is in flight. Surplus groups of a round stay buffered for the next
batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from speed_async.buffer.evaluations import EvaluationPlan, Evaluations
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState
from speed_async.buffer.priority import BufferedGroup
from speed_async.config.schema import Config
from speed_async.transport.messages import Leases, TakeBatch

ROUND_MARGIN = 1.15
"""Factor by which a round exceeds the size that the acceptance rate implies, since a second round
costs more."""


@dataclass(kw_only=True, slots=True)
class BatchesState:
    request: TakeBatch | None = None
    """The open request."""
    requested_s: float = 0.0
    round_left: int = 0
    """Leases of the current round that are not granted yet."""
    starved_s: float = 0.0
    """Time that the last batch waited for groups."""


class Batches:
    def __init__(self, config: Config, lifecycle: Lifecycle, state: BatchesState) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._state = state

    @property
    def starved_s(self) -> float:
        """Time that the last batch waited for groups."""
        return self._state.starved_s

    def request(self, take: TakeBatch, now_s: float) -> None:
        self._state.request, self._state.requested_s = take, now_s

    def cancel(self) -> None:
        self._state.request, self._state.round_left = None, 0

    @property
    def num_grantable(self) -> int:
        """Training leases that may be granted now."""
        credits_left = self._lifecycle.credits_left
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
        if not self._config.run.overlap and (evaluating or self._lifecycle.leases.num_charged):
            return None
        groups = self._lifecycle.groups.take(self._state.request.num_groups)
        if groups is None:
            return None
        take = self._state.request
        self._state.starved_s = now_s - self._state.requested_s
        self.cancel()
        return take, groups

    def stalled(self, now_s: float) -> bool:
        return (
            self._state.request is not None
            and now_s - self._state.requested_s >= self._config.cluster.stall_timeout_s
        )

    def waited_s(self, now_s: float) -> float | None:
        """Time that the learner has waited for a batch; None without an open request."""
        return None if self._state.request is None else now_s - self._state.requested_s


class Grants:
    """Distributes leases among the actors that want work.

    The first evaluation of a suite, and evaluations when training is over, are urgent: they take
    the place of training. Any other evaluation is given in addition to what an actor wants, at most
    one completion per slot; the actor fits it in (actors/evaluation_gate.py).
    """

    def __init__(
        self, config: Config, lifecycle: Lifecycle, batches: Batches, evaluations: Evaluations
    ) -> None:
        self._slack = config.buffer.max_staleness if config.run.overlap else 0
        self._slots = config.actors.slots
        self._lifecycle = lifecycle
        self._batches = batches
        self._evaluations = evaluations

    def next(
        self, present: Sequence[ActorState], policy_version: int, now_s: float, *, training: bool
    ) -> Iterator[tuple[str, Leases]]:
        """All leases that may be granted now. Evaluation leases go to actors that hold the
        evaluated version. Training leases go, in equal shares, to actors within the staleness
        bound."""
        plans = self._evaluations.leasable()
        if not plans and not (training and self._batches.num_grantable > 0):
            return
        if not any(state.want for state in present):
            return
        ready = [state for state in present if not (state.leaving or state.awaits_weights)]
        for plan in plans:
            yield from self._grant_evaluation(plan, ready, now_s, training=training)
        if not training:
            return
        oldest = policy_version - self._slack
        fresh = [state for state in ready if state.applied_version >= oldest]
        fresh.sort(key=lambda state: -state.want)
        for position, state in enumerate(fresh):
            if not state.want:
                break
            share = math.ceil(self._batches.num_grantable / (len(fresh) - position))
            if share < 1:
                break
            count = min(state.want, share)
            leases = self._lifecycle.grant_training(state.name, count, now_s)
            if leases is not None:
                state.want -= len(leases.lease_ids)
                self._batches.granted(len(leases.lease_ids))
                yield state.name, leases

    def _grant_evaluation(
        self, plan: EvaluationPlan, ready: Sequence[ActorState], now_s: float, *, training: bool
    ) -> Iterator[tuple[str, Leases]]:
        urgent = plan.evaluated_version is None or not training
        for state in ready:
            if not state.want or state.applied_version < (plan.target_version or 0):
                continue
            count = state.want if urgent else self._num_fitting(plan, state)
            leases = self._lifecycle.grant_evaluation(state.name, plan, count, now_s, urgent=urgent)
            if leases is not None:
                state.want -= urgent * len(leases.lease_ids)
                yield state.name, leases

    def _num_fitting(self, plan: EvaluationPlan, state: ActorState) -> int:
        """Leases that bring an actor's open evaluation completions to its number of slots."""
        num_free = self._slots - self._lifecycle.leases.num_evaluating(state.name)
        return max(0, math.ceil(num_free / plan.num_samples))
