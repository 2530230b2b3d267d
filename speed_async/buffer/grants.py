"""Distribution of leases among the actors."""

import math
from collections.abc import Iterator, Sequence

from speed_async.buffer.batches import Batches
from speed_async.buffer.evaluations import EvaluationPlan
from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.membership import ActorState
from speed_async.config.schema import Config
from speed_async.transport.messages import Leases
from speed_async.types import LeaseKind


class Grants:
    def __init__(
        self, config: Config, lifecycle: Lifecycle, batches: Batches, evaluations: EvaluationPlan
    ) -> None:
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
        target = self._evaluations.target_version
        if target is None and not (training and self._batches.num_grantable > 0):
            return
        if not any(state.want for state in present):
            return
        ready = [state for state in present if not (state.leaving or state.awaits_weights)]
        if target is not None:
            for state in ready:
                if state.applied_version >= target:
                    yield from self._grant(state, LeaseKind.EVALUATION, state.want, now_s)
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
            for name, leases in self._grant(state, LeaseKind.TRAINING, count, now_s):
                self._batches.granted(len(leases.lease_ids))
                yield name, leases

    def _grant(
        self, state: ActorState, kind: LeaseKind, max_leases: int, now_s: float
    ) -> Iterator[tuple[str, Leases]]:
        leases = self._lifecycle.grant(state.name, kind, max_leases, now_s)
        if leases is not None:
            state.want -= len(leases.lease_ids)
            yield state.name, leases
