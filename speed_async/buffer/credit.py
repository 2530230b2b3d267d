"""Admission credits: how many more training leases may be granted, and the cost of each."""

from dataclasses import dataclass

from speed_async.buffer.leases import LeaseTable
from speed_async.buffer.ledger import Ledger
from speed_async.buffer.priority import PriorityBuffer
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.config.schema import Config

BYTES_WINDOW = 16
"""Time constant, in groups, of the running mean of group sizes."""
MIN_CREDITS_PER_PROMPT = 1 / 16
"""Bounds the number of leases when hardly any prompt passes the gate."""


@dataclass(kw_only=True, slots=True)
class CreditState:
    mean_group_bytes: float = 0.0
    """Running mean. It starts at 0, which underestimates the first groups."""


class Credit:
    def __init__(
        self,
        config: Config,
        *,
        leases: LeaseTable,
        ledger: Ledger,
        buffer: PriorityBuffer,
        statistics: RunStatistics,
        state: CreditState,
    ) -> None:
        self._config = config
        self._leases = leases
        self._ledger = ledger
        self._buffer = buffer
        self._statistics = statistics
        self._state = state

    def left(self, num_in_training: int) -> int:
        """Number of additional training leases that may be granted.

        A prompt under screening costs its expected yield, which is the acceptance rate of the
        gate. A group that is continued, buffered or in training costs one credit. So one batch for
        each version of the staleness window is in progress at any acceptance rate, and no more.
        Backpressure starts earlier if these groups would not fit `buffer.capacity_bytes`.
        """
        if self._config.run.updates == 0:
            return 0  # the run only evaluates
        num_leased = self._leases.num_charged
        continuing = min(self._ledger.groups_continuing, num_leased)
        certain = len(self._buffer) + num_in_training + continuing
        uncertain = int((self._max_groups - certain) / self.credits_per_prompt)
        return max(0, uncertain - num_leased + continuing)

    @property
    def credits_per_prompt(self) -> float:
        """Cost of a prompt under screening: the expected number of groups from it."""
        if self._config.gate.mode == "off":
            return 1.0
        return max(self._statistics.expected_yield, MIN_CREDITS_PER_PROMPT)

    def record_group_size(self, num_bytes: int) -> None:
        self._state.mean_group_bytes += (num_bytes - self._state.mean_group_bytes) / BYTES_WINDOW

    @property
    def _max_groups(self) -> int:
        """Limit on groups in flight, buffered or in training. It is a number of groups and, unless
        surplus groups spill to disk, also the bytes that they take at their recent mean size."""
        most = self._config.max_credits
        if self._config.buffer.spill or not self._state.mean_group_bytes:
            return most
        fitting = int(self._config.buffer.capacity_bytes / self._state.mean_group_bytes)
        return min(most, max(fitting, self._config.learner.groups_per_update))
