"""The weight synchronisation interface: one sender in the learner, one receiver in every engine.

Both block, and run in separate threads. Every stage has the offer's deadline.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from speed_async.types import WeightOffer
from speed_async.weight_sync.canary_check import Canary

NamedTensor = tuple[str, Tensor]
LoadTensors = Callable[[Sequence[NamedTensor]], None]
"""Copies one bucket of tensors into a model. The tensors are only valid during the call.

A receiver that writes in place calls it with an empty list before the first write.
"""
WholeTensors = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferReport:
    num_bytes: int
    num_buckets: int
    transfer_s: float
    canary: Canary | None = None
    """Receivers only: the canary of the loaded version; None when the sender provided none."""
    digests: Mapping[str, int] = field(default_factory=dict)
    """Receivers only: the sender's digest of every tensor, for `digests.verify_digests`."""


class WeightSender(Protocol):
    @property
    def store_address(self) -> tuple[str, int]:
        """Host and port of this sender's store."""
        ...

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        """Broadcasts all tensors to ranks 1..world_size-1, with their digests and the canary (None:
        none). `whole` gathers those with these names, if `tensors` are sharded; they are only kept
        until they are sent. `lost` are ranks that will not answer; it may grow during the call,
        which then need not wait until the deadline. Raises WeightSyncError naming the stage and,
        when known, the `missing_ranks`; the group of this epoch is then unusable."""
        ...

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        """Receives one broadcast. The manifest is compared with `expected` (names, shapes, dtypes)
        before any byte is loaded; a mismatch raises WeightSyncError naming it."""
        ...

    def close(self) -> None: ...
