"""Credit: how many training leases may still be granted, and what one costs."""

from speed_async.buffer.leases import LeaseTable
from speed_async.buffer.ledger import Ledger
from speed_async.buffer.priority import PriorityBuffer
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.config.schema import Config

BYTES_WINDOW = 16
"""Groups over which the running mean of their bytes forgets."""
MIN_PRICE = 1 / 16
"""Keeps the number of leases bounded where hardly any prompt passes."""


class Credit:
    def __init__(
        self,
        config: Config,
        *,
        leases: LeaseTable,
        ledger: Ledger,
        buffer: PriorityBuffer,
        statistics: RunStatistics,
    ) -> None:
        self._config = config
        self._leases = leases
        self._ledger = ledger
        self._buffer = buffer
        self._statistics = statistics
        self._bytes_a_group = 0.0
        """Running mean; it starts low, and so do the first groups."""

    def left(self, num_in_training: int) -> int:
        """Training leases that may still be granted.

        A prompt under screening is charged what it is expected to yield, the share that the gate
        lets pass; a group that is continued, buffered or in training is charged whole. So a batch
        for each version of the staleness window is under way whatever the gate refuses, and no
        more. Where that would not fit `buffer.capacity_bytes`, actors are held back before it.
        """
        if self._config.run.updates == 0:
            return 0  # evaluated only
        num_leased = self._leases.num_charged
        continuing = min(self._ledger.groups_continuing, num_leased)
        certain = len(self._buffer) + num_in_training + continuing
        uncertain = int((self._most_groups - certain) / self.price)
        return max(0, uncertain - num_leased + continuing)

    @property
    def price(self) -> float:
        """Credits for a prompt under screening: the groups to expect of it."""
        if self._config.gate.mode == "off":
            return 1.0
        return max(self._statistics.expected_yield, MIN_PRICE)

    def weighed(self, num_bytes: int) -> None:
        """A group came, of this size."""
        self._bytes_a_group += (num_bytes - self._bytes_a_group) / BYTES_WINDOW

    @property
    def _most_groups(self) -> int:
        """Groups that may be on their way, buffered or in training: by number, and, unless what
        is too much waits on disk, by their bytes as they have been lately."""
        most = self._config.max_credits
        if self._config.buffer.spill or not self._bytes_a_group:
            return most
        fitting = int(self._config.buffer.capacity_bytes / self._bytes_a_group)
        return min(most, max(fitting, self._config.learner.groups_per_update))
