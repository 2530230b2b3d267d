"""Who works on what. A training lease holds one credit from its grant to its group's end."""

from dataclasses import dataclass

from speed_async.types import Lease, LeaseKind


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLease:
    lease: Lease
    holder: str
    """Name of the actor that works on it."""


class LeaseBook:
    """All open leases, by id and by holder. Ids grow and are never used again."""

    def __init__(self) -> None:
        self.num_training = 0
        """Open training leases."""
        self._next_id = 0
        self._open: dict[int, OpenLease] = {}
        self._of_holder: dict[str, dict[int, OpenLease]] = {}

    def grant(
        self, holder: str, prompt_id: int, kind: LeaseKind, num_samples: int = 0
    ) -> OpenLease:
        lease = Lease(
            lease_id=self._next_id, prompt_id=prompt_id, kind=kind, num_samples=num_samples
        )
        self._next_id += 1
        entry = OpenLease(lease=lease, holder=holder)
        self._open[lease.lease_id] = entry
        self._of_holder.setdefault(holder, {})[lease.lease_id] = entry
        self.num_training += kind is LeaseKind.TRAINING
        return entry

    def holds(self, holder: str, lease_id: int) -> bool:
        """Whether this actor may still report a result for this lease."""
        entry = self._open.get(lease_id)
        return entry is not None and entry.holder == holder

    def end(self, lease_id: int) -> OpenLease:
        """Close a lease. Raises KeyError when it is not open: each lease ends once."""
        entry = self._open.pop(lease_id)
        self.num_training -= entry.lease.kind is LeaseKind.TRAINING
        held = self._of_holder[entry.holder]
        del held[lease_id]
        if not held:
            del self._of_holder[entry.holder]
        return entry

    def of_holder(self, holder: str) -> list[OpenLease]:
        """Oldest first."""
        return list(self._of_holder.get(holder, {}).values())
