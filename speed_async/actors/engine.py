"""The engine interface that the actor loop generates with.

Shape legend: P prompt tokens, T completion tokens.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from speed_async.types import Int32Array, Sampled, WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """A request for one completion. Requests with lower `priority` values are served first."""

    prompt_token_ids: Int32Array  # (P,)
    max_new_tokens: int
    temperature: float
    """0 is greedy decoding; the log-probabilities are then those at temperature 1."""
    top_p: float
    priority: int
    max_staleness: int | None = None
    """Maximum age of usable tokens, in policy versions; None: unbounded."""
    oldest_version: int | None = None
    """Oldest policy version among the tokens that its group already has."""
    seed: int | None = None
    """Seed of this request's samples, in [0, 2^63). The completion is then reproducible, regardless
    of the other requests, up to rounding of the logits. None: the engine's own random state."""

    def is_stale(self, first_version: int | None, policy_version: int) -> bool:
        """Whether a group with this completion exceeds `max_staleness` at `policy_version`.

        `first_version` is the version of the completion's first token; None when it has none.
        """
        known = [v for v in (first_version, self.oldest_version) if v is not None]
        if self.max_staleness is None or not known:
            return False
        return policy_version - min(known) > self.max_staleness


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Cumulative counts and current load, taken between decode steps."""

    tokens_generated: int
    """All tokens sampled since the start, counted when they are sampled."""
    tokens_running: int
    """Tokens sampled so far for requests that have not returned yet."""
    num_running: int
    num_waiting: int
    num_slots: int
    policy_version: int
    steps: int
    sampling_s: float = 0.0
    """Time spent in steps, including prefill."""
    updating_s: float = 0.0
    """Time spent on weight updates and other commands between steps."""

    def gauges(self) -> dict[str, float]:
        """The gauges of an ActorReport (transport/messages.py)."""
        return {
            "slots_busy": float(self.num_running),
            "num_slots": float(self.num_slots),
            "num_waiting": float(self.num_waiting),
            "policy_version": float(self.policy_version),
            "sampling_s": self.sampling_s,
            "updating_s": self.updating_s,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """Timing of one weight update."""

    policy_version: int
    transfer_s: float
    """Time to receive and load."""
    pause_s: float
    """Total time during which the update blocked sampling."""


class Engine(Protocol):
    """Generates completions with one policy version at a time.

    `generate` returns when the sequence finishes (EOS: "stop", limit: "length") or is aborted
    ("abort", with the tokens so far). An exception in the engine is raised in every waiting call.
    """

    async def generate(self, request: GenerationRequest) -> Sampled: ...

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        """Receive and load the offered version between two decode steps.

        Running sequences continue: their next tokens are sampled under the new version, with the
        existing KV cache or a recomputed one (`actors.running_at_update`). Requests that are too
        old for the offered version are aborted first and return their tokens so far. Raises
        WeightSyncError or DeadlineExceeded. After a failure the engine either still holds a valid
        version or is unusable, and then raises on the next call.
        """
        ...

    async def pause(self, *, abort: bool) -> None:
        """Stop sampling after the current step.

        With `abort`, running and waiting requests return their tokens so far with finish_reason
        "abort"; without it, they wait for `resume`.
        """
        ...

    async def resume(self) -> None: ...

    @property
    def stats(self) -> EngineStats: ...


class ManagedEngine(Engine, Protocol):
    """An engine as a context manager: entering loads the model, exiting frees all resources."""

    @property
    def tokens_cancelled(self) -> int:
        """Tokens sampled for cancelled calls.

        Invariant: tokens_generated = tokens returned + tokens_cancelled + tokens_running.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
