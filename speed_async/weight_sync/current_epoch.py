"""The epoch that a sender or a receiver takes part in, and the end of an epoch that failed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.epoch_group import EpochGroup, StageFailed

CLOSE_S = 1.0


class CurrentEpoch:
    """The weight group that a sender or a receiver uses at present; one that failed is not used
    again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: EpochGroup | None = None
        self._failed: tuple[int, str] | None = None

    @contextmanager
    def transfer(self, offer: WeightOffer) -> Iterator[EpochGroup]:
        """The group of the offer's epoch, created if necessary. An exception in the block makes the
        epoch unusable; StageFailed is raised as WeightSyncError."""
        group = self._group_for(offer)
        try:
            yield group
            group.complete()
        except StageFailed as failure:
            self._fail(group, str(failure))
            raise group.explain(failure) from failure
        except BaseException as error:
            self._fail(group, str(error) or type(error).__name__)
            raise

    def close(self) -> None:
        """Waits at most CLOSE_S for the group to be freed."""
        group, self._group = self._group, None
        if group is not None:
            group.free(CLOSE_S)

    def _fail(self, group: EpochGroup, reason: str) -> None:
        self._failed, self._group = (group.offer.epoch, reason), None
        group.leave(reason)

    def _group_for(self, offer: WeightOffer) -> EpochGroup:
        if self._failed is not None and self._failed[0] == offer.epoch:
            raise WeightSyncError(
                f"epoch {offer.epoch} is unusable, a new epoch is required: {self._failed[1]}"
            )
        current = self._group
        if current is None or current.offer.epoch != offer.epoch:
            if current is not None:
                current.free()
            self._group = current = EpochGroup(offer, self._device)
        if (ours := _members(current.offer)) != (theirs := _members(offer)):
            raise WeightSyncError(
                f"epoch {offer.epoch} has {ours}, but the offer has {theirs}: different members"
                " require a new epoch"
            )
        current.offer = offer
        return current


def _members(offer: WeightOffer) -> str:
    return f"rank {offer.rank} of {offer.world_size} over {offer.backend}"
