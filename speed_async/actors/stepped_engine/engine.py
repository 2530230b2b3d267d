"""The asynchronous layer: implements `Engine` on top of any `Worker`.

Requests and commands collect in an input that the worker fetches. Completions are delivered as
results arrive, and their callers run while the worker continues.
"""

import asyncio
import itertools
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepped_engine.admission import sequence_limit
from speed_async.actors.stepped_engine.core import (
    Command,
    IterationInput,
    IterationResult,
    LoadWeights,
    Pause,
    Resume,
)
from speed_async.actors.stepped_engine.worker import Worker
from speed_async.errors import SpeedAsyncError
from speed_async.types import Sampled, WeightOffer


class SteppedEngine:
    """Implements `Engine`. Entering starts the worker and waits until it has loaded.

    An error in an iteration is raised in every waiting and every later call. So is the error of a
    weight update that leaves no valid version.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._keys = itertools.count()
        self._input = IterationInput()
        self._callers: dict[int, asyncio.Future[Sampled]] = {}
        self._commands: deque[asyncio.Future[Any]] = deque()  # pending commands, oldest first
        self._failure: Exception | None = None
        self._tokens_cancelled = 0
        self._tokens_undelivered = 0  # in resolved futures whose callers have not resumed yet

    async def __aenter__(self) -> Self:
        self._wake = asyncio.Event()
        try:
            self._limits, self._stats = await self._worker.start()
        except BaseException:
            await self._worker.close()
            raise
        self._task = asyncio.create_task(self._run(), name="engine")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Running completions fail with SpeedAsyncError."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._worker.close()

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._stats,
            tokens_running=self._stats.tokens_running + self._tokens_undelivered,
            num_waiting=max(0, len(self._callers) - self._stats.num_running),
        )

    @property
    def tokens_cancelled(self) -> int:
        """Tokens sampled for cancelled calls.

        Invariant: tokens_generated = tokens returned + tokens_cancelled + tokens_running.
        """
        return self._tokens_cancelled

    async def generate(self, request: GenerationRequest) -> Sampled:
        """Raises ModelError or ConfigError immediately when the request cannot be served.

        Cancellation frees the request's slot before the next step.
        """
        self._check_usable()
        sequence_limit(request, self._limits)
        key = next(self._keys)
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self._callers[key] = future
        self._input.arrivals.append((key, request))
        self._wake.set()
        try:
            sampled = await future
        except asyncio.CancelledError:
            self._discard(key, future)
            raise
        self._tokens_undelivered -= sampled.num_tokens
        return sampled

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        return await self._command(LoadWeights(offer=offer))

    async def pause(self, *, abort: bool) -> None:
        await self._command(Pause(abort=abort))

    async def resume(self) -> None:
        await self._command(Resume())

    async def _command(self, command: Command) -> Any:
        self._check_usable()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._input.commands.append(command)
        self._commands.append(future)
        self._wake.set()
        return await future

    async def _run(self) -> None:
        try:
            await self._worker.run(self._wake, self._take_input, self._deliver)
        except asyncio.CancelledError:
            self._fail(SpeedAsyncError("the engine was closed before this request finished"))
            raise
        except Exception as error:  # task boundary: an error in an iteration fails every request
            self._fail(error)

    def _take_input(self) -> IterationInput:
        inputs, self._input = self._input, IterationInput()
        return inputs

    def _deliver(self, result: IterationResult) -> None:
        self._stats = result.stats
        self._tokens_cancelled += result.tokens_cancelled
        for finished in result.finished:
            future = self._callers.pop(finished.key, None)
            if future is None or future.done():  # cancelled during this iteration
                self._tokens_cancelled += finished.sampled.num_tokens
            else:
                self._tokens_undelivered += finished.sampled.num_tokens
                future.set_result(finished.sampled)
        for answer in result.answers:
            future = self._commands.popleft()
            if future.done():
                continue
            if isinstance(answer, SpeedAsyncError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _discard(self, key: int, future: asyncio.Future[Sampled]) -> None:
        """Discard a request whose caller was cancelled."""
        if future.cancelled():
            if self._callers.pop(key, None) is not None:
                self._input.cancelled.append(key)
                self._wake.set()
        elif future.exception() is None:
            num_tokens = future.result().num_tokens
            self._tokens_undelivered -= num_tokens
            self._tokens_cancelled += num_tokens

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        for future in (*self._callers.values(), *self._commands):
            if not future.done():
                future.set_exception(failure)
        self._callers.clear()
        self._commands.clear()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
