"""Scores completions in worker processes that may raise, hang or die.

pebble manages the processes: it kills a worker whose call exceeds its time limit and starts
another. pebble cannot recover from the death of an idle worker, which breaks the whole pool; this
module then replaces the pool and retries the call.
"""

import asyncio
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Self, TypeVar, cast

from pebble import ProcessExpired, ProcessPool
from pebble.common.types import MultiprocessingContext

from speed_async.config.sections.task import RewardConfig
from speed_async.environments.rewards import CORRECT, unscored
from speed_async.environments.verifier_worker import (
    MakeTask,
    Reply,
    report_start,
    score_packed,
    start_worker,
)
from speed_async.errors import TaskError
from speed_async.observability.first_error import LogSince
from speed_async.types import Prompt, Verdict

MAX_ATTEMPTS = 3
"""Maximum pools that one call may use before it fails; another call may have broken them."""
MAX_WORKER_DEATHS = 2
"""Worker deaths during a call before the call fails. One is tolerated, because pebble can
attribute a death to the previous call, whose reply was still in transit."""
MAX_FAILED_CALLS = 3
"""Calls with one completion that may time out or kill their worker before the rest is given up. A
call of the pool thus takes at most 1 + MAX_FAILED_CALLS time limits, apart from valid calls."""
STOP_TIMEOUT_S = 15.0
_GRACE_S = 5.0

T = TypeVar("T")


class VerifierPool:
    """Async context manager; entering waits until a worker has created its task.

    `make` must be picklable, such as `functools.partial(make_task, config.task)`. Workers are
    spawned, not forked, so the caller may have threads. They import the caller's main module,
    which should have few imports. Calls are served first in, first out; cancelling a call that is
    being scored kills its worker.
    """

    def __init__(
        self,
        make: MakeTask,
        num_workers: int,
        timeout_s: float,
        *,
        rewards: Sequence[RewardConfig] = CORRECT,
        start_timeout_s: float = 120.0,
    ) -> None:
        """`timeout_s` limits the scoring time of one call, excluding time in the queue; `rewards`
        are those of the configuration (environments/rewards.py)."""
        self._make = make
        self._rewards = tuple(rewards)
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        # Workers die with the thread that started them, so this thread lives as long as the pool.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="verifier-starter")
        self._replacing = asyncio.Lock()
        self._pool: ProcessPool | None = None
        self._outstanding: set[asyncio.Future[Reply]] = set()
        self._num_replies = 0

    async def __aenter__(self) -> Self:
        """Raises TaskError when the workers cannot start."""
        try:
            self._pool = await self._start()
        except BaseException:
            self._starter.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        pool, self._pool = self._pool, None
        for future in self._outstanding:
            future.cancel()
        async with self._replacing:  # a pending replacement is stopped by the call that started it
            if pool is not None:
                await self._stop(pool)
        self._starter.shutdown(wait=False)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion of one prompt, in one round trip.

        Scoring that raises or returns no valid reward is the outcome `error` of its completion.
        When the call exceeds `timeout_s` or kills its process, its completions are scored one at a
        time, so that only those at fault are left without a reward. Raises TaskError when nothing
        can be scored: the pool is closed or broken, or the prompt cannot be sent.
        """
        verdicts = await self._score_together(prompt, completions)
        if isinstance(verdicts, list):
            return verdicts
        return [verdicts] if len(completions) == 1 else await self._score_each(prompt, completions)

    async def _score_each(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        """Verdicts of calls with one completion. After MAX_FAILED_CALLS that failed, the rest
        shares the outcome of the last one, so that a call takes a bounded time."""
        verdicts: list[Verdict] = []
        failed: list[Verdict] = []
        for completion in completions:
            if len(failed) == MAX_FAILED_CALLS:
                last = failed[-1]
                text = f"was not tried after {MAX_FAILED_CALLS} other completions: {last.error}"
                verdicts.append(unscored(last.outcome, text))
                continue
            scored = await self._score_together(prompt, [completion])
            if not isinstance(scored, list):
                failed.append(scored)
                scored = [scored]
            verdicts += scored
        return verdicts

    async def _score_together(
        self, prompt: Prompt, completions: Sequence[str]
    ) -> list[Verdict] | Verdict:
        """Verdicts of one call, or a verdict without a reward if the call failed as a whole."""
        payload, name = _pack(prompt, completions), _prompt_name(prompt)
        num_deaths = 0
        for _ in range(MAX_ATTEMPTS):
            pool = self._pool
            if pool is None:
                raise TaskError("the verifier pool is not open")
            try:
                reply = await self._call(pool, payload)
            except BrokenProcessPool:
                await self._replace(pool)
            except TimeoutError:
                return unscored(
                    "timeout",
                    f"did not return within {self._timeout_s:g} s (actors.verifier_timeout_s); its "
                    "worker was killed",
                )
            except ProcessExpired as error:
                num_deaths += 1
                if num_deaths == MAX_WORKER_DEATHS:
                    text = f"ended its worker process (exit code {error.exitcode})"
                    return unscored("error", text)
            else:
                if isinstance(reply, str):
                    raise TaskError(f"the verifier of {name} {reply}")
                return reply
        raise TaskError(f"the verifier pool broke {MAX_ATTEMPTS} times on {name}")

    async def _call(self, pool: ProcessPool, payload: bytes) -> Reply:
        """Raises BrokenProcessPool also when no worker of the pool replies for `_stall_s`."""
        future = _schedule(pool, score_packed, (payload,), self._timeout_s)
        self._outstanding.add(future)
        try:
            while True:
                num_replies = self._num_replies
                await asyncio.wait({future}, timeout=self._stall_s)
                if future.cancelled():
                    raise TaskError("the verifier pool was closed")
                if future.done():
                    self._num_replies += 1
                    return future.result()
                if self._num_replies == num_replies:
                    raise BrokenProcessPool(f"no reply from any worker for {self._stall_s:g} s")
        finally:
            self._outstanding.discard(future)
            future.cancel()

    @property
    def _stall_s(self) -> float:
        """A healthy pool replies, times out or restarts a worker well within this."""
        return self._timeout_s + self._start_timeout_s + _GRACE_S

    async def _replace(self, broken: ProcessPool) -> None:
        async with self._replacing:
            if self._pool is broken:
                replacement = await self._start()
                if self._pool is broken:
                    self._pool = replacement
                    await self._stop(broken)
                else:  # closed in the meantime
                    await self._stop(replacement)

    async def _start(self) -> ProcessPool:
        _check_picklable(self._make)
        log = LogSince()
        pool = ProcessPool(
            self._num_workers,
            initializer=start_worker,
            initargs=(self._make, self._rewards),
            context=cast(MultiprocessingContext, get_context("spawn")),
        )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                fault = await self._first_reply(pool)
        except TimeoutError:
            fault = f"no worker created its task within {self._start_timeout_s:g} s"
        except BrokenProcessPool:
            cause = log.first_error() or "see its stderr"
            fault = f"its worker process exited during start: {cause}"
        except BaseException:
            await self._stop(pool)
            raise
        if fault:
            await self._stop(pool)
            raise TaskError(f"the verifier could not start: {fault}")
        return pool

    async def _first_reply(self, pool: ProcessPool) -> str:
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self._starter, pool.schedule, report_start)
        return await asyncio.wrap_future(await starting)

    async def _stop(self, pool: ProcessPool) -> None:
        """Stop a pool's processes and threads; waits at most STOP_TIMEOUT_S."""
        stopping = asyncio.get_running_loop().run_in_executor(self._starter, _stop_and_join, pool)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping, STOP_TIMEOUT_S)


def _schedule(
    pool: ProcessPool, function: Callable[..., T], args: tuple[object, ...], timeout_s: float
) -> asyncio.Future[T]:
    try:
        return asyncio.wrap_future(pool.schedule(function, args=args, timeout=timeout_s))
    except RuntimeError as error:  # raised by pebble when the pool is broken
        raise BrokenProcessPool(str(error)) from error


def _stop_and_join(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _pack(prompt: Prompt, completions: Sequence[str]) -> bytes:
    """Pickled here, because an error in pebble's sender thread would stop the pool."""
    try:
        return pickle.dumps((prompt, list(completions)))
    except Exception as error:
        raise TaskError(f"{_prompt_name(prompt)} cannot be sent to a verifier: {error}") from error


def _check_picklable(make: MakeTask) -> None:
    try:
        pickle.dumps(make)
    except Exception as error:
        raise TaskError(f"the verifier could not start: {make!r} is not picklable") from error


def _prompt_name(prompt: Prompt) -> str:
    return f"{'held-out' if prompt.held_out else 'training'} prompt {prompt.prompt_id}"
