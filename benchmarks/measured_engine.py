"""Turns of an engine that is paused between them, and an engine that records its requests."""

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from speed_async.actors.engine import (
    EngineStats,
    GenerationRequest,
    ManagedEngine,
    UpdateReport,
)
from speed_async.types import Sampled, WeightOffer

SETTLE_S = 0.2


class RecordingEngine:
    """Records the requests sent to its engine."""

    def __init__(self, engine: ManagedEngine) -> None:
        self._engine = engine
        self.recorded: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> Sampled:
        self.recorded.append(request)
        return await self._engine.generate(request)

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        return await self._engine.update_weights(offer)

    async def pause(self, *, abort: bool) -> None:
        await self._engine.pause(abort=abort)

    async def resume(self) -> None:
        await self._engine.resume()

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    async def __aenter__(self) -> Self:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._engine.__aexit__(*details)


class MeasuredEngine(Protocol):
    """What a measurement needs of an engine."""

    async def generate(self, request: GenerationRequest) -> object: ...

    async def pause(self, *, abort: bool) -> None: ...

    async def resume(self) -> None: ...

    @property
    def stats(self) -> EngineStats: ...

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    tokens_per_s: float
    slots_busy: float
    steps_per_s: float
    slots_asked: float
    """Requests running or waiting at the end of the turn."""


async def measure_turn(engine: MeasuredEngine, duration_s: float) -> Turn:
    """Resume a paused engine for `duration_s`, then pause it again."""
    before, start_s = engine.stats, time.perf_counter()
    await engine.resume()
    await asyncio.sleep(duration_s)
    await engine.pause(abort=False)
    elapsed_s, after = time.perf_counter() - start_s, engine.stats
    await asyncio.sleep(SETTLE_S)
    num_tokens = after.tokens_generated - before.tokens_generated
    num_steps = after.steps - before.steps
    return Turn(
        tokens_per_s=num_tokens / elapsed_s,
        slots_busy=num_tokens / max(num_steps, 1),
        steps_per_s=num_steps / elapsed_s,
        slots_asked=after.num_running + after.num_waiting,
    )
