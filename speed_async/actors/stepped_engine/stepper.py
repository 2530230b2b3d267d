"""The interface between a synchronous generator and the asynchronous engine."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from speed_async.actors.engine import EngineStats, GenerationRequest
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.types import Sampled, WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRequest:
    """A finished request; `key` is the key it was submitted with."""

    key: int
    sampled: Sampled


def empty_sample() -> Sampled:
    """Result of a request that was aborted before its first token."""
    return Sampled(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
        finish_reason="abort",
    )


class Stepper(Protocol):
    """Advances all its requests by one token per step. Used by one thread at a time."""

    limits: ModelLimits

    @property
    def has_work(self) -> bool: ...

    def submit(self, key: int, request: GenerationRequest) -> None: ...

    def cancel(self, key: int) -> int:
        """Discard a request; returns its number of sampled tokens (0 when unknown)."""
        ...

    def step(self) -> list[FinishedRequest]: ...

    def abort(self) -> list[FinishedRequest]:
        """Abort every running or waiting request; each returns its tokens so far."""
        ...

    def abort_stale(self, policy_version: int) -> list[FinishedRequest]:
        """Abort every request that is too stale for this version (`GenerationRequest.is_stale`)."""
        ...

    def load_weights(self, offer: WeightOffer) -> float:
        """Load the offered version; returns the seconds spent receiving and loading.

        Raises WeightSyncError or DeadlineExceeded. `has_valid_weights` then indicates whether the
        stepper still holds a valid version.
        """
        ...

    @property
    def has_valid_weights(self) -> bool: ...

    def stats(self) -> EngineStats: ...
