"""The worker interface that runs an engine core, and its thread implementation.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `ThreadWorker.run` | inputs | an iteration; when idle, `wake` | the thread; any engine call |
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from speed_async.actors.engine import EngineStats
from speed_async.actors.stepped_engine.admission import ModelLimits
from speed_async.actors.stepped_engine.core import (
    Clock,
    EngineCore,
    IterationInput,
    IterationResult,
)
from speed_async.actors.stepped_engine.stepper import Stepper


class Worker(Protocol):
    """Runs the core of one `SteppedEngine`."""

    async def start(self) -> tuple[ModelLimits, EngineStats]:
        """Load the model; returns the request limits and the initial stats. Raises load errors."""
        ...

    async def run(
        self,
        wake: asyncio.Event,
        take: Callable[[], IterationInput],
        deliver: Callable[[IterationResult], None],
    ) -> None:
        """Iterate until cancelled. `take` returns the input since its last call; `wake` is set
        when the input is not empty. Raises the error of a failed iteration, which is final."""
        ...

    async def close(self) -> None:
        """Free all resources. Safe after a failed `start`."""
        ...


class ThreadWorker:
    """Runs the core, and `make_stepper`, in one dedicated thread."""

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
        take: Callable[[], IterationInput],
        deliver: Callable[[IterationResult], None],
    ) -> None:
        loop, core = asyncio.get_running_loop(), self._core
        assert core is not None, "call start before run"
        while True:
            inputs = take()
            if inputs or core.has_work:
                deliver(await loop.run_in_executor(self._thread, core.iterate, inputs))
            else:
                wake.clear()
                await wake.wait()

    async def close(self) -> None:
        """Stops after the current iteration."""
        self._thread.shutdown(wait=True)
        self._core = None
