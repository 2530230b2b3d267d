"""Who takes part: one group for each epoch, and how a member leaves without blocking anyone."""

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
    """The present epoch's group and the buffers that outlive it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.views = Views()
        self._buffers = BufferRing()
        self._group: EpochGroup | None = None
        self._lost: tuple[int, str] | None = None

    @contextmanager
    def taking_part(self, offer: WeightOffer) -> Iterator[EpochGroup]:
        """The offer's group, new or as it was. Any exception inside makes its epoch unusable."""
        group = self._enter(offer)
        finished = False
        try:
            yield group
            group.num_transfers += 1
            finished = True
        finally:
            if not finished:
                reason = str(sys.exception()) or type(sys.exception()).__name__
                self._lost = (offer.epoch, reason)
                group.announce_end(reason)
                self._leave()

    def travels_from(self, group: EpochGroup) -> torch.device:
        """Where bytes lie when they leave or arrive: host memory for gloo, a GPU's for NCCL."""
        return torch.device("cpu") if group.offer.backend == "gloo" else self._device

    def reserve(self, group: EpochGroup, buckets: Sequence[Bucket]) -> BufferRing:
        """Buffers for these buckets, where they travel from."""
        device = self.travels_from(group)
        pinned = self._device.type == "cuda" and device.type == "cpu"
        self._buffers.reserve(buckets, device, pinned=pinned)
        return self._buffers

    def settle(self) -> None:
        """Wait until copies queued on the GPU are done, so that their buffer may be used."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Waits at most CLOSE_S for the group to be freed."""
        group = self._group
        self._leave()
        if group is not None:
            group.join(CLOSE_S)

    def _enter(self, offer: WeightOffer) -> EpochGroup:
        if self._lost is not None and self._lost[0] == offer.epoch:
            raise WeightSyncError(
                f"epoch {offer.epoch} is unusable, a new one is needed: {self._lost[1]}"
            )
        present = self._group
        if present is not None and present.offer.epoch == offer.epoch:
            if _members(present.offer) != _members(offer):
                raise WeightSyncError(
                    f"epoch {offer.epoch} has {_members(present.offer)}, but the offer says"
                    f" {_members(offer)}: other members need a new epoch"
                )
            present.offer = offer
            return present
        self._leave()
        self._group = EpochGroup(offer, self._device)
        return self._group

    def _leave(self) -> None:
        if self._group is None:
            return
        self._group.drop()
        self._group = None
        self._buffers.discard()  # the lane may still write into them
        self.views.discard()


def _members(offer: WeightOffer) -> str:
    return f"rank {offer.rank} of {offer.world_size} over {offer.backend}"
