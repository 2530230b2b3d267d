"""Membership in the weight groups: one group per epoch, which a member leaves without blocking."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import Bucket, BufferRing, Views
from speed_async.weight_sync.epoch_group import EpochGroup

CLOSE_S = 1.0


class Membership:
    """The group of the current epoch, and buffers that are reused across epochs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.views = Views()
        self._buffers = BufferRing()
        self._group: EpochGroup | None = None
        self._failed: tuple[int, str] | None = None

    @contextmanager
    def transfer_group(self, offer: WeightOffer) -> Iterator[EpochGroup]:
        """The group of the offer's epoch, created if necessary. An exception in the block makes the
        epoch unusable."""
        group = self._group_for(offer)
        finished = False
        try:
            yield group
            group.num_transfers += 1
            finished = True
        finally:
            if not finished:
                reason = str(sys.exception()) or type(sys.exception()).__name__
                self._failed = (offer.epoch, reason)
                group.announce_end(reason)
                self._drop_group()

    def transfer_device(self, group: EpochGroup) -> torch.device:
        """Device of the transferred bytes: host memory for gloo, GPU memory for NCCL."""
        return torch.device("cpu") if group.offer.backend == "gloo" else self._device

    def reserve(self, group: EpochGroup, buckets: Sequence[Bucket]) -> BufferRing:
        """Buffers for these buckets, on the transfer device."""
        device = self.transfer_device(group)
        pinned = self._device.type == "cuda" and device.type == "cpu"
        self._buffers.reserve(buckets, device, pinned=pinned)
        return self._buffers

    def synchronize(self) -> None:
        """Waits for copies queued on the GPU, so that their buffers can be used."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Waits at most CLOSE_S for the group to be freed."""
        group = self._group
        self._drop_group()
        if group is not None:
            group.join(CLOSE_S)

    def _group_for(self, offer: WeightOffer) -> EpochGroup:
        if self._failed is not None and self._failed[0] == offer.epoch:
            raise WeightSyncError(
                f"epoch {offer.epoch} is unusable, a new epoch is required: {self._failed[1]}"
            )
        current = self._group
        if current is not None and current.offer.epoch == offer.epoch:
            if _members(current.offer) != _members(offer):
                raise WeightSyncError(
                    f"epoch {offer.epoch} has {_members(current.offer)}, but the offer has"
                    f" {_members(offer)}: different members require a new epoch"
                )
            current.offer = offer
            return current
        self._drop_group()
        self._group = EpochGroup(offer, self._device)
        return self._group

    def _drop_group(self) -> None:
        if self._group is None:
            return
        self._group.drop()
        self._group = None
        self._buffers.discard()  # the group's thread may still write into them
        self.views.discard()


def _members(offer: WeightOffer) -> str:
    return f"rank {offer.rank} of {offer.world_size} over {offer.backend}"
