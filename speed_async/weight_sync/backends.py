"""Transport of buckets from the sender to the receivers: one sender and one receiver class per
backend.

The sender acquires a buffer, fills it and sends it. A receiver takes a bucket, loads it and
releases it. The classes for process groups are defined here, those for shared memory in
`shared_memory.py`.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from speed_async.weight_sync.buckets import NUM_BUFFERS, Bucket, BufferRing
from speed_async.weight_sync.epoch_group import EpochGroup


class Outgoing(Protocol):
    """Sends the buckets of one transfer, in order."""

    accepts_views: bool
    """Whether `send` accepts any memory, not only acquired buffers."""

    def acquire(self, index: int) -> Tensor:
        """A buffer for this bucket, at least (B,) uint8; waits until one is free.

        Raises StageFailed naming the ranks that still use it.
        """
        ...

    def send(self, index: int, packed_B: Tensor) -> None:
        """Sends bucket `index`. The memory must not change until `finish`."""
        ...

    def flush(self) -> None:
        """Starts the transfer of all queued buckets."""
        ...

    def finish(self) -> None:
        """Waits until every bucket was sent. Raises StageFailed."""
        ...


class Incoming(Protocol):
    """Receives the buckets of one transfer, in order."""

    def take(self, index: int) -> Tensor:
        """Bucket `index`, at least (B,) uint8, valid until released. Raises StageFailed."""
        ...

    def release(self, index: int) -> None:
        """Marks the bucket as loaded. Raises StageFailed."""
        ...


class GroupOutgoing:
    """Broadcasts over the epoch's process group; satisfies `Outgoing`."""

    accepts_views = True

    def __init__(self, group: EpochGroup, buckets: Sequence[Bucket], buffers: BufferRing) -> None:
        self._group, self._buckets, self._buffers = group, buckets, buffers
        self._in_flight: list[Future[None]] = []
        self._queued: list[Tensor] = []
        self._num_sent = 0

    def acquire(self, index: int) -> Tensor:
        self.flush()
        self._wait_until_sent(index - NUM_BUFFERS)
        return self._buffers.get(index)

    def send(self, index: int, packed_B: Tensor) -> None:
        self._queued.append(packed_B)  # buckets that need no packing are sent together

    def flush(self) -> None:
        if self._queued:
            self._in_flight += self._group.broadcast(*self._queued)
            self._queued = []

    def finish(self) -> None:
        self._wait_until_sent(len(self._buckets) - 1)

    def _wait_until_sent(self, last: int) -> None:
        for index in range(self._num_sent, last + 1):
            self._group.wait(bucket_stage(index, self._buckets), self._in_flight[index])
            self._num_sent += 1


class GroupIncoming:
    """Receives broadcasts of the epoch's process group; satisfies `Incoming`."""

    def __init__(
        self,
        group: EpochGroup,
        buckets: Sequence[Bucket],
        buffers: BufferRing,
    ) -> None:
        """Receives into buffers, never directly into a model: a transfer that fails before its
        first bucket is complete must leave the old weights intact."""
        self._group, self._buckets, self._buffers = group, buckets, buffers
        self._in_flight: list[Future[None]] = []
        self._targets: list[Tensor] = []
        self._num_released = 0
        self._post()

    def take(self, index: int) -> Tensor:
        self._group.wait(bucket_stage(index, self._buckets), self._in_flight[index])
        return self._targets[index]

    def release(self, index: int) -> None:
        self._num_released = index + 1
        self._post()

    def _post(self) -> None:
        """Posts receives, in order, for all buckets that have a free buffer."""
        first = len(self._targets)
        last = min(len(self._buckets), self._num_released + NUM_BUFFERS)
        self._targets += [self._buffers.get(index) for index in range(first, last)]
        posted = zip(self._buckets[first:], self._targets[first:], strict=False)
        if len(self._targets) > first:
            self._in_flight += self._group.broadcast(
                *(target_B[: bucket.num_bytes] for bucket, target_B in posted)
            )


def bucket_stage(index: int, buckets: Sequence[Bucket]) -> str:
    return f"bucket {index + 1} of {len(buckets)}"
