"""Leases: the prompts that each actor works on, and the credits that bound their number.

A training lease holds one credit from its grant until its group ends or the lease expires.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from speed_async.buffer.ledger import Ledger
from speed_async.buffer.priority import PriorityBuffer
from speed_async.buffer.reporting.statistics import RunStatistics
from speed_async.config.schema import Config
from speed_async.types import Lease, LeaseKind

SKIPPED_IDS = 1 << 20
"""Upper bound on the leases granted between two checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLease:
    lease: Lease
    holder: str
    """Name of the actor that holds the lease."""
    granted_s: float
    expired: bool = False
    """Its prompt was requeued and its credit returned. A late result still counts once."""

    @property
    def is_training(self) -> bool:
        return self.lease.kind is LeaseKind.TRAINING


@dataclass(kw_only=True, slots=True)
class LeasesState:
    next_id: int = 0
    open: dict[int, OpenLease] = field(default_factory=dict)
    """By id, in the order of grants."""


class LeaseTable:
    """All open leases, by id and by holder. Ids increase and are never reused."""

    def __init__(self, state: LeasesState) -> None:
        training = [entry for entry in state.open.values() if entry.is_training]
        self.num_training = len(training)
        """Open training leases."""
        self.num_charged = sum(not entry.expired for entry in training)
        """Open training leases that have not expired. Each holds a credit."""
        self._state = state
        self._open = state.open
        self._ids_of: dict[str, set[int]] = {}
        self._num_evaluating: Counter[str] = Counter()
        for lease_id, entry in state.open.items():
            self._ids_of.setdefault(entry.holder, set()).add(lease_id)
            self._num_evaluating[entry.holder] += entry.lease.num_samples

    def grant(
        self,
        holder: str,
        prompt_id: int,
        *,
        suite: str = "",
        num_samples: int = 0,
        now_s: float = 0.0,
    ) -> OpenLease:
        """Open a training lease, or an evaluation lease of this suite."""
        lease = Lease(
            lease_id=self._state.next_id,
            prompt_id=prompt_id,
            kind=LeaseKind.EVALUATION if suite else LeaseKind.TRAINING,
            suite=suite,
            num_samples=num_samples,
        )
        self._state.next_id += 1
        entry = OpenLease(lease=lease, holder=holder, granted_s=now_s)
        self._open[lease.lease_id] = entry
        self._ids_of.setdefault(holder, set()).add(lease.lease_id)
        self._num_evaluating[holder] += num_samples
        self.num_training += entry.is_training
        self.num_charged += entry.is_training
        return entry

    def num_evaluating(self, holder: str) -> int:
        """Completions of the open evaluation leases of this actor."""
        return self._num_evaluating[holder]

    def skip_past(self, lease_id: int) -> None:
        """Skip the ids up to this one and the SKIPPED_IDS after it, which may have been granted."""
        self._state.next_id = max(self._state.next_id, lease_id + 1 + SKIPPED_IDS)

    def held_by(self, holder: str, lease_id: int) -> Lease | None:
        """The lease if it is open and this actor holds it; None otherwise."""
        entry = self._open.get(lease_id)
        return entry.lease if entry is not None and entry.holder == holder else None

    def end(self, lease_id: int) -> OpenLease:
        """Close a lease. Raises KeyError if it is not open: each lease ends once."""
        entry = self._open.pop(lease_id)
        self._ids_of[entry.holder].discard(lease_id)
        if not self._ids_of[entry.holder]:
            del self._ids_of[entry.holder]
        self._num_evaluating[entry.holder] -= entry.lease.num_samples
        if not self._num_evaluating[entry.holder]:
            del self._num_evaluating[entry.holder]
        self.num_training -= entry.is_training
        self.num_charged -= entry.is_training and not entry.expired
        return entry

    def expire(self, before_s: float) -> list[OpenLease]:
        """Mark as expired, and return, the unexpired leases granted before this time."""
        expired: list[OpenLease] = []
        for entry in self._open.values():
            if entry.granted_s >= before_s:
                break
            if not entry.expired:
                expired.append(entry)
        for entry in expired:
            self._open[entry.lease.lease_id] = replace(entry, expired=True)
            self.num_charged -= entry.is_training
        return expired

    def of_holder(self, holder: str) -> list[OpenLease]:
        return [self._open[lease_id] for lease_id in sorted(self._ids_of.get(holder, ()))]


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
