"""What a learner that comes back may have to train again.

These are the updates that its oldest kept checkpoint does not hold, each with its groups, whose
arrays are in the journal.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from speed_async.buffer.group_table import BufferedGroup
from speed_async.transport.messages import Trained


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBatch:
    """An update that a checkpoint may have to repeat: its groups, in the order of the batch."""

    policy_version: int
    """After the update."""
    groups: tuple[BufferedGroup, ...]
    skipped: bool
    loss: float | None
    grad_norm: float | None

    @property
    def lease_ids(self) -> list[int]:
        return [group.lease_id for group in self.groups]


class Lineage:
    def __init__(self) -> None:
        self.num_repeated = 0
        """Updates trained again from the journal, in all lives."""
        self.num_repeated_alike = 0
        """Of those, updates with the same groups, loss and gradient norm, bit for bit."""
        self._batches: deque[TrainedBatch] = deque()  # oldest first: versions ascend

    def trained(self, message: Trained, groups: Sequence[BufferedGroup]) -> None:
        """Note an update; without a journal there is nothing to come back to."""
        if groups and all(group.place is not None for group in groups):
            self._batches.append(
                TrainedBatch(
                    policy_version=message.policy_version,
                    groups=tuple(replace(group, message=None) for group in groups),
                    skipped=message.skipped,
                    loss=message.metrics.get("loss"),
                    grad_norm=message.metrics.get("grad_norm"),
                )
            )

    def after(self, policy_version: int) -> TrainedBatch | None:
        """The update that led from this version to the next."""
        place = bisect_left(self._batches, policy_version + 1, key=lambda b: b.policy_version)
        found = self._batches[place] if place < len(self._batches) else None
        return found if found and found.policy_version == policy_version + 1 else None

    def leads(self, version: int, to_version: int) -> bool:
        """Whether every update between the two can be trained again."""
        return version <= to_version and all(map(self.after, range(version, to_version)))

    def repeated(self, message: Trained) -> None:
        """A recorded update was trained again."""
        batch = self.after(message.policy_version - 1)
        self.num_repeated += 1
        if batch is not None and batch.lease_ids == message.lease_ids:
            then = (batch.loss, batch.grad_norm, batch.skipped)
            now = (message.metrics.get("loss"), message.metrics.get("grad_norm"), message.skipped)
            self.num_repeated_alike += then == now

    def forget_to(self, policy_version: int) -> None:
        """A durable checkpoint of this version is the oldest that is kept."""
        while self._batches and self._batches[0].policy_version <= policy_version:
            self._batches.popleft()

    def clear(self) -> None:
        self._batches.clear()

    @property
    def groups(self) -> list[BufferedGroup]:
        return [group for batch in self._batches for group in batch.groups]
