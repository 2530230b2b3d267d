"""The weight seam: one sender in the learner, one receiver in every engine.

Both ends block (they run in threads of their own) and every stage has the offer's deadline.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from speed_async.types import WeightOffer
from speed_async.weight_sync.canary import Canary

NamedTensor = tuple[str, Tensor]
LoadTensors = Callable[[Sequence[NamedTensor]], None]
"""Copies one bucket of tensors into a model; the tensors are only valid during the call.

A receiver that was made to write in place calls it with no tensors before it begins to.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferReport:
    num_bytes: int
    num_buckets: int
    transfer_s: float
    canary: Canary | None = None
    """At receivers: what to check the loaded version against; None when the sender gave none."""


class WeightSender(Protocol):
    @property
    def store_address(self) -> tuple[str, int]:
        """Where receivers find the store of this sender."""
        ...

    def send(
        self, offer: WeightOffer, tensors: Iterable[NamedTensor], canary: Canary | None = None
    ) -> TransferReport:
        """Broadcast all tensors to ranks 1..world_size-1, and the canary that receivers are to
        verify them by (None: they verify nothing). Raises WeightSyncError naming the stage and,
        when known, the `missing_ranks`; the group of this epoch is then unusable."""
        ...

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        """Take part in one broadcast. The manifest is compared with `expected` (names, shapes,
        dtypes) before any byte is loaded; a mismatch raises WeightSyncError naming it."""
        ...

    def close(self) -> None: ...
