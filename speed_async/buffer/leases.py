"""Leases: the prompts that each actor works on, and the credits that bound their number.

A training lease holds one credit from its grant until its group ends or the lease expires.
"""

import math
from collections import Counter, defaultdict
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
    policy_version: int = 0
    """Version that the actor sampled with at the grant: no token of the lease is older."""
    reserved_tokens: float | None = None
    """Expected tokens of an evaluation lease that `evaluate.max_share` bounds; None for others."""
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
        self._holders: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Holders of the charged leases, by policy version, with their numbers."""
        for entry in training:
            if not entry.expired:
                self._count_holder(entry, 1)
        self._ids_of: dict[str, set[int]] = {}
        for lease_id, entry in state.open.items():
            self._ids_of.setdefault(entry.holder, set()).add(lease_id)

    def grant(
        self,
        holder: str,
        prompt_id: int,
        *,
        suite: str = "",
        num_samples: int = 0,
        now_s: float = 0.0,
        policy_version: int = 0,
        reserved_tokens: float | None = None,
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
        entry = OpenLease(
            lease=lease,
            holder=holder,
            granted_s=now_s,
            policy_version=policy_version,
            reserved_tokens=reserved_tokens,
        )
        self._open[lease.lease_id] = entry
        self._ids_of.setdefault(holder, set()).add(lease.lease_id)
        self.num_training += entry.is_training
        self._charge(entry, 1)
        return entry

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
        self.num_training -= entry.is_training
        if not entry.expired:
            self._charge(entry, -1)
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
            self._charge(entry, -1)
        return expired

    @property
    def oldest_version(self) -> int | None:
        """Oldest version that an open, unexpired training lease may have tokens of; None if there
        is none."""
        return min(self._holders, default=None)

    def holders(self, *, before_version: int) -> set[str]:
        """Actors with open, unexpired training leases from before this version."""
        late = (holders for version, holders in self._holders.items() if version < before_version)
        return set().union(*late)

    def _charge(self, entry: OpenLease, num_leases: int) -> None:
        """Count an unexpired training lease that begins or ends."""
        if not entry.is_training:
            return
        self.num_charged += num_leases
        self._count_holder(entry, num_leases)

    def _count_holder(self, entry: OpenLease, num_leases: int) -> None:
        holders = self._holders[entry.policy_version]
        holders[entry.holder] += num_leases
        if not holders[entry.holder]:
            del holders[entry.holder]
        if not holders:
            del self._holders[entry.policy_version]

    def of_holder(self, holder: str) -> list[OpenLease]:
        return [self._open[lease_id] for lease_id in sorted(self._ids_of.get(holder, ()))]


BYTES_WINDOW = 16
"""Time constant, in groups, of the running mean of group sizes."""
YIELD_MARGIN = 3.0
"""Standard deviations of the number of groups from the prompts under screening. A smaller margin
admits more groups than the learner trains before they become stale."""
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
        self._batch = config.learner.groups_per_update
        self._max_credits = config.max_credits
        self._window = max(config.max_credits, (config.buffer.max_staleness + 1) * self._batch)

    def left(self, num_in_training: int, version_lag: int) -> int:
        """Number of additional training leases that may be granted to an actor that samples with a
        version this far behind the newest.

        A group that is continued, buffered or in training costs one credit, a prompt under
        screening its expected yield, which is the acceptance rate of the gate, and a margin. So at
        any acceptance rate, no more groups are in progress than the learner trains until the first
        tokens of the lease become stale: one batch for each version until then. There is no margin
        for the prompts that complete the next batch, so that the learner does not wait longer.
        Backpressure starts earlier if these groups would not fit `buffer.capacity_bytes`.
        """
        if self._config.run.updates == 0:
            return 0  # the run only evaluates
        num_leased = self._leases.num_charged
        continuing = min(self._ledger.groups_continuing, num_leased)
        waiting = len(self._buffer) + continuing
        spare = self._max_groups(version_lag) - num_in_training - waiting
        missing = self._batch - waiting
        completing = int(min(spare, missing) / self.credits_per_prompt)
        uncertain = max(self._num_prompts(spare), completing)
        return max(0, uncertain - num_leased + continuing)

    def _num_prompts(self, num_groups: int) -> int:
        """Number of prompts under screening that rarely yield more groups than this: the mean of
        their yield plus YIELD_MARGIN standard deviations of a binomial distribution is
        `num_groups`. Without overlap, surplus groups are intended (buffer/batches.py), and there is
        no margin."""
        mean = self.credits_per_prompt
        margin = YIELD_MARGIN * math.sqrt(mean * (1 - mean)) if self._config.run.overlap else 0.0
        root = math.sqrt(margin**2 + 4 * mean * max(0, num_groups)) - margin
        return int((root / (2 * mean)) ** 2 + 1e-9)

    @property
    def credits_per_prompt(self) -> float:
        """Cost of a prompt under screening: the expected number of groups from it."""
        if self._config.gate.mode == "off":
            return 1.0
        return max(self._statistics.expected_yield, MIN_CREDITS_PER_PROMPT)

    def record_group_size(self, num_bytes: int) -> None:
        self._state.mean_group_bytes += (num_bytes - self._state.mean_group_bytes) / BYTES_WINDOW

    def _max_groups(self, version_lag: int) -> int:
        """Limit on groups in flight, buffered or in training, for a lease whose first tokens are
        `version_lag` versions old, so that as many batches less are trained before they are stale.
        It is a number of groups and, unless surplus groups spill to disk, also the bytes that they
        take at their recent mean size."""
        most = min(self._max_credits, self._window - version_lag * self._batch)
        if self._config.buffer.spill or not self._state.mean_group_bytes:
            return most
        fitting = int(self._config.buffer.capacity_bytes / self._state.mean_group_bytes)
        return min(most, max(fitting, self._batch))
