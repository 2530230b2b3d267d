"""The engine seam: what the actor loop asks of a generator.

Shape legend: P prompt tokens, T completion tokens.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from speed_async.types import Int32Array, Sampled, WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One independent completion. Lower `priority` is served first."""

    prompt_token_ids: Int32Array  # (P,)
    max_new_tokens: int
    temperature: float
    top_p: float
    priority: int
    max_staleness: int | None = None
    """Tokens older than this many versions are worth nothing; None: age does not matter."""
    oldest_version: int | None = None
    """Of the tokens that its group has already."""

    def is_too_old(self, first_version: int | None, policy_version: int) -> bool:
        """Whether nothing that includes this completion may be used at `policy_version`.
        `first_version` is that of its own first token, None when it has none."""
        known = [v for v in (first_version, self.oldest_version) if v is not None]
        if self.max_staleness is None or not known:
            return False
        return policy_version - min(known) > self.max_staleness


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Cumulative counts and present load, taken between decode steps."""

    tokens_generated: int
    """Every token ever sampled, counted where it is sampled."""
    tokens_running: int
    """Tokens sampled so far by requests that have not returned yet."""
    num_running: int
    num_waiting: int
    num_slots: int
    policy_version: int
    steps: int
    sampling_s: float = 0.0
    """Time spent in steps, prefills included."""
    updating_s: float = 0.0
    """Time spent on weights and on what else runs between steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """How one weight update went."""

    policy_version: int
    transfer_s: float
    """Receiving and loading."""
    pause_s: float
    """Whole time no token was sampled because of the update."""


class Engine(Protocol):
    """Generates under one policy version at a time.

    `generate` returns when the sequence ended (EOS: "stop", limit: "length") or was aborted
    ("abort", with the tokens so far). An exception in the engine reaches every waiting caller.
    """

    async def generate(self, request: GenerationRequest) -> Sampled: ...

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        """Receive and load the offered version between two decode steps.

        Running sequences go on; their next tokens are sampled under the new version, over the
        keys and values they have or over new ones (`actors.running_at_update`). Before, requests
        that are too old for the offered version return what they have, as an "abort". Raises
        WeightSyncError or DeadlineExceeded; the engine then still holds a whole, known version or
        is unusable and says so on the next call.
        """
        ...

    async def pause(self, *, abort: bool) -> None:
        """Stop sampling after the present step. With `abort`, running and waiting requests
        return what they have with finish_reason "abort"; without, they wait for `resume`."""
        ...

    async def resume(self) -> None: ...

    @property
    def stats(self) -> EngineStats: ...


class OwnedEngine(Engine, Protocol):
    """An engine with its life: entering loads the model, leaving frees everything."""

    @property
    def tokens_cancelled(self) -> int:
        """Tokens sampled for callers that were cancelled. At every instant:
        tokens_generated = tokens returned + tokens_cancelled + tokens_running."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
