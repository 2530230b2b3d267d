"""The leases that an actor holds, its cumulative counts, and how many prompts it requests."""

import math
from collections.abc import Iterator

from speed_async.actors.engine import EngineStats
from speed_async.actors.rollout import LeaseProgress
from speed_async.config.sections.gate import GateConfig
from speed_async.types import ActorCounts

REQUESTS_PER_SLOT = 2.0
"""Target number of requests per engine slot, so that no slot waits for a lease."""


class RunningLeases:
    def __init__(self, gate: GateConfig, num_slots: int) -> None:
        self._num_slots = num_slots
        self._first_phase = gate.num_screening or gate.group_size
        """Completions that a new lease starts."""
        self._works: dict[int, LeaseProgress] = {}
        self._groups_leased = 0
        self._completions_generated = 0
        self._num_requested = 0
        """Prompts that were requested and not granted yet."""

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[LeaseProgress]:
        return iter(self._works.values())

    def add(self, work: LeaseProgress) -> None:
        self._works[work.lease.lease_id] = work
        self._groups_leased += 1
        self._num_requested -= 1

    def remove(self, work: LeaseProgress) -> None:
        del self._works[work.lease.lease_id]
        self._completions_generated += len(work.samples)

    def next_request(self) -> int | None:
        """The number of prompts to request; None when it differs little from the last request."""
        num_waiting = sum(work.num_waiting for work in self)
        num_missing = self._num_slots * REQUESTS_PER_SLOT - num_waiting
        want = max(0, math.ceil(num_missing / self._first_phase))
        change = abs(want - self._num_requested) * self._first_phase
        if change < max(self._first_phase, self._num_slots // 16):
            return None
        self._num_requested = want
        return want

    def counts(self, stats: EngineStats) -> ActorCounts:
        num_finished = sum(work.num_tokens for work in self)
        return ActorCounts(
            groups_leased=self._groups_leased,
            groups_in_flight=len(self),
            groups_continuing=sum(work.continuing for work in self),
            completions_generated=self._completions_generated,
            tokens_generated=stats.tokens_generated,
            tokens_in_flight=stats.tokens_running + num_finished,
        )
