"""Who takes an engine's turns: a seam, and the one that does it in a thread.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `ThreadWorker.run` | inboxes | a turn; when idle, `wake` | the thread; any call of the engine |
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from speed_async.actors.engine import EngineStats
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.actors.stepped_engine.core import Clock, EngineCore, Inbox, TurnResult
from speed_async.actors.stepped_engine.stepper import Stepper


class Worker(Protocol):
    """Takes turns for one `SteppedEngine`."""

    async def start(self) -> tuple[ModelLimits, EngineStats]:
        """Load; returns the limits of requests and the first counts. Raises what loading raises."""
        ...

    async def run(
        self,
        wake: asyncio.Event,
        take: Callable[[], Inbox],
        deliver: Callable[[TurnResult], None],
    ) -> None:
        """Take turns until cancelled. `take` hands over what was asked since the last call, `wake`
        is set when there is anything. Raises what broke a turn: no more will come."""
        ...

    async def close(self) -> None:
        """Free everything; also after a failed `start`."""
        ...


class ThreadWorker:
    """One dedicated thread, where `make_stepper` runs too."""

    def __init__(
        self, make_stepper: Callable[[], Stepper], *, clock: Clock = time.monotonic
    ) -> None:
        self._make_stepper = make_stepper
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._core: EngineCore | None = None

    async def start(self) -> tuple[ModelLimits, EngineStats]:
        loop = asyncio.get_running_loop()
        stepper = await loop.run_in_executor(self._thread, self._make_stepper)
        self._core = EngineCore(stepper, clock=self._clock)
        return self._core.limits, self._core.stats

    async def run(
        self,
        wake: asyncio.Event,
        take: Callable[[], Inbox],
        deliver: Callable[[TurnResult], None],
    ) -> None:
        loop, core = asyncio.get_running_loop(), self._core
        assert core is not None, "run comes after start"
        while True:
            inbox = take()
            if inbox or core.has_work:
                deliver(await loop.run_in_executor(self._thread, core.turn, inbox))
            else:
                wake.clear()
                await wake.wait()

    async def close(self) -> None:
        """Ends after the present turn."""
        self._thread.shutdown(wait=True)
        self._core = None
