"""The asynchronous shell: makes an `Engine` of any `Stepper`.

One dedicated thread runs the stepper, one turn after another while there is work. What callers
ask for during a turn lands in inboxes and is applied at the start of the next one; completions
are handed out between turns, and their callers run while the next turn computes.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `_run` | inboxes | a turn; when idle, `_wake` | the worker thread; any call of a method |
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from speed_async.actors.admission import sequence_limit
from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepper import Finished, Stepper
from speed_async.errors import SpeedAsyncError
from speed_async.types import Sampled, WeightOffer

Clock = Callable[[], float]
Command = Callable[[list[Finished]], Any]
"""Runs between two steps; may add to the requests that finished, and returns its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inbox:
    """What callers asked for since the last turn began."""

    arrivals: list[tuple[int, GenerationRequest]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    commands: list[tuple[Command, asyncio.Future[Any]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.cancelled or self.commands)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TurnResult:
    finished: list[Finished]
    answers: list[Any]  # one a command; a SpeedAsyncError is raised to who asked
    tokens_cancelled: int
    stats: EngineStats


class SteppedEngine:
    """Implements `Engine`. Entering calls `make_stepper` in the worker thread.

    An exception of the stepper reaches every waiting caller and every later call, and so does a
    failed weight update that leaves no whole version behind.
    """

    def __init__(
        self, make_stepper: Callable[[], Stepper], *, clock: Clock = time.monotonic
    ) -> None:
        self._make_stepper = make_stepper
        self._clock = clock
        self._keys = itertools.count()
        self._inbox = _Inbox()
        self._callers: dict[int, asyncio.Future[Sampled]] = {}
        self._commands_open: set[asyncio.Future[Any]] = set()
        self._is_paused = False
        self._is_closing = False
        self._failure: Exception | None = None
        self._sampling_s = self._updating_s = 0.0
        self._tokens_cancelled = 0
        self._tokens_unseen = 0  # of resolved futures whose callers have not run yet

    async def __aenter__(self) -> Self:
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        try:
            loop = asyncio.get_running_loop()
            self._stepper = await loop.run_in_executor(self._thread, self._make_stepper)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._stats = self._stepper.stats()
        self._task = asyncio.create_task(self._run(), name="engine")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends after the present step; completions still running fail with SpeedAsyncError."""
        self._is_closing = True
        self._wake.set()
        try:
            await self._task
        finally:
            self._thread.shutdown(wait=True)
            del self._stepper

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._stats,
            tokens_running=self._stats.tokens_running + self._tokens_unseen,
            num_waiting=max(0, len(self._callers) - self._stats.num_running),
            sampling_s=self._sampling_s,
            updating_s=self._updating_s,
        )

    @property
    def tokens_cancelled(self) -> int:
        """Tokens sampled for callers that were cancelled. At every instant:
        tokens_generated = tokens returned + tokens_cancelled + tokens_running."""
        return self._tokens_cancelled

    async def generate(self, request: GenerationRequest) -> Sampled:
        """Raises ModelError or ConfigError at once when the request cannot be served.

        Cancelling it frees the request's slot before the next step.
        """
        self._check_usable()
        sequence_limit(request, self._stepper.context_length)
        key = next(self._keys)
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self._callers[key] = future
        self._inbox.arrivals.append((key, request))
        self._wake.set()
        try:
            sampled = await future
        except asyncio.CancelledError:
            self._forget(key, future)
            raise
        self._tokens_unseen -= sampled.num_tokens
        return sampled

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        def update(finished: list[Finished]) -> UpdateReport:
            begun_s = self._clock()
            transfer_s = self._stepper.load_weights(offer)
            return UpdateReport(
                policy_version=offer.policy_version,
                transfer_s=transfer_s,
                pause_s=self._clock() - begun_s,
            )

        return await self._between_steps(update)

    async def pause(self, *, abort: bool) -> None:
        self._is_paused = True

        def stop(finished: list[Finished]) -> None:
            if abort:
                finished += self._stepper.abort()

        await self._between_steps(stop)

    async def resume(self) -> None:
        self._check_usable()
        self._is_paused = False
        self._wake.set()

    async def _between_steps(self, command: Command) -> Any:
        self._check_usable()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._inbox.commands.append((command, future))
        self._commands_open.add(future)
        self._wake.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        failure: Exception = SpeedAsyncError("the engine was closed before this request ended")
        try:
            while not self._is_closing:
                may_sample = self._stepper.has_work and not self._is_paused
                if not self._inbox and not may_sample:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                inbox, self._inbox = self._inbox, _Inbox()
                result = await loop.run_in_executor(
                    self._thread, self._turn, inbox, not self._is_paused
                )
                self._deliver(inbox, result)
        except Exception as error:  # task boundary: whatever broke a turn ends every request
            failure = error
        finally:
            self._fail(failure)

    def _turn(self, inbox: _Inbox, may_sample: bool) -> _TurnResult:
        """In the worker thread."""
        stepper = self._stepper
        finished: list[Finished] = []
        answers: list[Any] = []
        for key, request in inbox.arrivals:
            stepper.submit(key, request)
        tokens_cancelled = sum(stepper.cancel(key) for key in inbox.cancelled)
        begun_s = self._clock()
        for command, _ in inbox.commands:
            try:
                answers.append(command(finished))
            except SpeedAsyncError as error:
                if not stepper.is_whole:
                    raise
                answers.append(error)
        stepping_s = self._clock()
        if may_sample and stepper.has_work:
            finished += stepper.step()
        self._updating_s += stepping_s - begun_s
        self._sampling_s += self._clock() - stepping_s
        return _TurnResult(
            finished=finished,
            answers=answers,
            tokens_cancelled=tokens_cancelled,
            stats=stepper.stats(),
        )

    def _deliver(self, inbox: _Inbox, result: _TurnResult) -> None:
        self._stats = result.stats
        self._tokens_cancelled += result.tokens_cancelled
        for finished in result.finished:
            future = self._callers.pop(finished.key, None)
            if future is None or future.done():  # cancelled while this turn was under way
                self._tokens_cancelled += finished.sampled.num_tokens
            else:
                self._tokens_unseen += finished.sampled.num_tokens
                future.set_result(finished.sampled)
        for (_, future), answer in zip(inbox.commands, result.answers, strict=True):
            self._commands_open.discard(future)
            if future.done():
                continue
            if isinstance(answer, SpeedAsyncError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _forget(self, key: int, future: asyncio.Future[Sampled]) -> None:
        """The caller of this request was cancelled."""
        if future.cancelled():
            if self._callers.pop(key, None) is not None:
                self._inbox.cancelled.append(key)
                self._wake.set()
        elif future.exception() is None:
            num_tokens = future.result().num_tokens
            self._tokens_unseen -= num_tokens
            self._tokens_cancelled += num_tokens

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        for future in (*self._callers.values(), *self._commands_open):
            if not future.done():
                future.set_exception(failure)
        self._callers.clear()
        self._commands_open.clear()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
