"""How buckets get from the sender to the receivers: one pair of ends for each way.

The sender borrows a buffer, fills it and passes it on; a receiver takes a bucket and releases it
when it is loaded. The ends over a process group are here, those over shared memory in
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
    """The sender's end for the buckets of one transfer, taken in order."""

    takes_views: bool
    """Whether any memory can be passed on, not only what was borrowed."""

    def borrow(self, index: int) -> Tensor:
        """A buffer, at least (B,) uint8, for this bucket; waits until one is free.

        Raises StageFailed naming who holds it.
        """
        ...

    def pass_on(self, index: int, packed_B: Tensor) -> None:
        """Let the receivers have bucket `index`; it must not change until `finish`."""
        ...

    def flush(self) -> None:
        """Let nothing that was passed on wait for more."""
        ...

    def finish(self) -> None:
        """Wait until every bucket has left. Raises StageFailed."""
        ...


class Incoming(Protocol):
    """A receiver's end for the buckets of one transfer, taken in order."""

    def take(self, index: int) -> Tensor:
        """Bucket `index`, at least (B,) uint8, valid until released. Raises StageFailed."""
        ...

    def release(self, index: int) -> None:
        """The bucket was loaded. Raises StageFailed."""
        ...


class GroupOutgoing:
    """Broadcasts over the epoch's process group; satisfies `Outgoing`."""

    takes_views = True

    def __init__(self, group: EpochGroup, buckets: Sequence[Bucket], buffers: BufferRing) -> None:
        self._group, self._buckets, self._buffers = group, buckets, buffers
        self._in_flight: list[Future[None]] = []
        self._held: list[Tensor] = []
        self._num_gone = 0

    def borrow(self, index: int) -> Tensor:
        self.flush()
        self._wait_until_gone(index - NUM_BUFFERS)
        return self._buffers.get(index)

    def pass_on(self, index: int, packed_B: Tensor) -> None:
        self._held.append(packed_B)  # what needs no packing leaves in one go

    def flush(self) -> None:
        if self._held:
            self._in_flight += self._group.broadcast(*self._held)
            self._held = []

    def finish(self) -> None:
        self._wait_until_gone(len(self._buckets) - 1)

    def _wait_until_gone(self, last: int) -> None:
        for index in range(self._num_gone, last + 1):
            self._group.wait(stage_of(index, self._buckets), self._in_flight[index])
            self._num_gone += 1


class GroupIncoming:
    """Receives broadcasts of the epoch's process group; satisfies `Incoming`."""

    def __init__(
        self,
        group: EpochGroup,
        buckets: Sequence[Bucket],
        buffers: BufferRing,
    ) -> None:
        """Received into buffers, never straight into a model: a transfer that breaks off before
        its first bucket is whole must leave the old weights whole."""
        self._group, self._buckets, self._buffers = group, buckets, buffers
        self._in_flight: list[Future[None]] = []
        self._places: list[Tensor] = []
        self._num_released = 0
        self._post()

    def take(self, index: int) -> Tensor:
        self._group.wait(stage_of(index, self._buckets), self._in_flight[index])
        return self._places[index]

    def release(self, index: int) -> None:
        self._num_released = index + 1
        self._post()

    def _post(self) -> None:
        """Let come all buckets, in order, for which there is a place."""
        first = len(self._places)
        last = min(len(self._buckets), self._num_released + NUM_BUFFERS)
        self._places += [self._buffers.get(index) for index in range(first, last)]
        news = zip(self._buckets[first:], self._places[first:], strict=False)
        if len(self._places) > first:
            self._in_flight += self._group.broadcast(
                *(place_B[: bucket.num_bytes] for bucket, place_B in news)
            )


def stage_of(index: int, buckets: Sequence[Bucket]) -> str:
    return f"bucket {index + 1} of {len(buckets)}"
