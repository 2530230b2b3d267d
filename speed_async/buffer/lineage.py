"""Updates that a resumed learner may have to repeat.

These are the updates after its oldest kept checkpoint, each with its groups, whose arrays are in
the journal.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from speed_async.buffer.priority import BufferedGroup
from speed_async.transport.messages import Trained


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBatch:
    """A recorded update and its groups, in the order of the batch."""

    policy_version: int
    """Policy version after the update."""
    groups: tuple[BufferedGroup, ...]
    skipped: bool
    loss: int | float | None
    grad_norm: int | float | None

    @property
    def lease_ids(self) -> list[int]:
        return [group.lease_id for group in self.groups]


@dataclass(kw_only=True, slots=True)
class Lineage:
    num_repeated: int = 0
    """Updates repeated from the journal, in all attempts."""
    num_repeated_identical: int = 0
    """Repeated updates with bit-identical groups, loss and gradient norm."""
    batches: deque[TrainedBatch] = field(default_factory=deque)
    """Oldest first: versions ascend."""

    def trained(self, message: Trained, groups: Sequence[BufferedGroup]) -> None:
        """Record an update. Without a journal it cannot be repeated, so it is not recorded."""
        if groups and all(group.place is not None for group in groups):
            self.batches.append(
                TrainedBatch(
                    policy_version=message.policy_version,
                    groups=tuple(replace(group, message=None) for group in groups),
                    skipped=message.skipped,
                    loss=message.metrics.get("loss"),
                    grad_norm=message.metrics.get("grad_norm"),
                )
            )

    def after(self, policy_version: int) -> TrainedBatch | None:
        """The recorded update from this version to the next; None if there is none."""
        index = bisect_left(self.batches, policy_version + 1, key=lambda b: b.policy_version)
        found = self.batches[index] if index < len(self.batches) else None
        return found if found and found.policy_version == policy_version + 1 else None

    def can_replay(self, version: int, to_version: int) -> bool:
        """Whether every update from `version` to `to_version` can be repeated."""
        return version <= to_version and all(map(self.after, range(version, to_version)))

    def record_repeat(self, message: Trained) -> None:
        """The learner repeated a recorded update."""
        batch = self.after(message.policy_version - 1)
        self.num_repeated += 1
        if batch is not None and batch.lease_ids == message.lease_ids:
            recorded = (batch.loss, batch.grad_norm, batch.skipped)
            repeated = (
                message.metrics.get("loss"),
                message.metrics.get("grad_norm"),
                message.skipped,
            )
            self.num_repeated_identical += recorded == repeated

    def prune(self, policy_version: int) -> None:
        """Drop the updates up to this version, that of the oldest kept checkpoint."""
        while self.batches and self.batches[0].policy_version <= policy_version:
            self.batches.popleft()

    def clear(self) -> None:
        self.batches.clear()

    @property
    def groups(self) -> list[BufferedGroup]:
        return [group for batch in self.batches for group in batch.groups]
