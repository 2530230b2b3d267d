"""The learner's batch request: which leases it permits, when it completes and how long it waits.

This module decides only; learner_handler.py acts on the decisions.

With `run.overlap`, actors generate whatever the credits allow, and a request completes as soon as
its batch is full. Without it, generation and training alternate. Prompts are granted only while
the learner waits, in rounds large enough to fill the batch, and the request completes when the
round has finished and no lease is in flight. Surplus groups of a round stay buffered for the next
batch.
"""

import math
from dataclasses import dataclass

from speed_async.buffer.lifecycle import Lifecycle
from speed_async.buffer.priority import BufferedGroup
from speed_async.config.schema import Config
from speed_async.transport.messages import TakeBatch

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
        missing = self._state.request.num_groups - len(self._lifecycle.buffer)
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
        groups = self._lifecycle.take(self._state.request.num_groups)
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
