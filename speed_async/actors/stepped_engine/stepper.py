"""What a synchronous generator offers to the asynchronous shell around it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from speed_async.actors.engine import EngineStats, GenerationRequest
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.types import Sampled, WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A request that ended; `key` is the one it was submitted under."""

    key: int
    sampled: Sampled


def nothing_sampled() -> Sampled:
    """Of a request that ended before it began."""
    return Sampled(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
        finish_reason="abort",
    )


class Stepper(Protocol):
    """Advances all its requests by one token a step. Used by one thread at a time."""

    limits: ModelLimits

    @property
    def has_work(self) -> bool: ...

    def submit(self, key: int, request: GenerationRequest) -> None: ...

    def cancel(self, key: int) -> int:
        """Forget a request; returns how many tokens it had sampled (0 when unknown)."""
        ...

    def step(self) -> list[Finished]: ...

    def abort(self) -> list[Finished]:
        """End every request, running or waiting, with what it has."""
        ...

    def abort_stale(self, policy_version: int) -> list[Finished]:
        """End every request that is too old for this version (`GenerationRequest.is_too_old`)."""
        ...

    def load_weights(self, offer: WeightOffer) -> float:
        """Take the offered version in; seconds spent receiving and loading.

        Raises WeightSyncError or DeadlineExceeded. `is_whole` tells whether a known version is
        still held afterwards.
        """
        ...

    @property
    def is_whole(self) -> bool: ...

    def stats(self) -> EngineStats: ...
