"""Fits the completions of evaluations in between those of training.

An evaluation completion enters the engine

- at once if its lease is urgent: nothing is trained before the first evaluation of the held-out
  prompts, or after the last update;
- when the engine has a free slot: it holds fewer requests than slots, so none waits for this one;
- while the evaluations that took a slot from training have at most `evaluate.max_share` of the
  tokens of this actor. So they complete even if training always needs all slots, and delay it by no
  more than that.

Otherwise it waits outside of the engine, in whose queue one of lowest priority could wait forever.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from speed_async.types import Sampled


@dataclass(kw_only=True, slots=True)
class _Tally:
    num_running: int = 0
    """Requests in the engine."""
    num_finished: int = 0
    num_tokens: int = 0
    """Tokens of the finished ones."""

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / self.num_finished if self.num_finished else 0.0


class EvaluationGate:
    def __init__(self, num_slots: int, max_share: float) -> None:
        self._num_slots = num_slots
        self._max_share = max_share
        self._charged = _Tally()
        """Evaluation completions that took a slot from training."""
        self._others = _Tally()
        self._waiting: deque[asyncio.Future[_Tally]] = deque()
        self._is_closed = False

    async def run(self, generate: Callable[[], Awaitable[Sampled]], *, gives_way: bool) -> Sampled:
        """Generate one completion. One that gives way to training may wait first."""
        if gives_way:
            tally = await self._wait()
        else:
            tally = self._others
            tally.num_running += 1
        try:
            sample = await generate()
            tally.num_finished += 1
            tally.num_tokens += sample.num_tokens
            return sample
        finally:
            self._leave(tally)

    def close(self) -> None:
        """Let everything pass: the actor drains."""
        self._is_closed = True
        self._admit_waiting()

    async def _wait(self) -> _Tally:
        """Wait to be admitted. Returns the tally in which the request is counted."""
        admission: asyncio.Future[_Tally] = asyncio.get_running_loop().create_future()
        self._waiting.append(admission)
        self._admit_waiting()
        try:
            return await admission
        except asyncio.CancelledError:
            if admission.done() and not admission.cancelled():
                self._leave(admission.result())
            raise

    def _leave(self, tally: _Tally) -> None:
        tally.num_running -= 1
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting and (tally := self._admitting()) is not None:
            admission = self._waiting.popleft()
            if not admission.cancelled():
                tally.num_running += 1
                admission.set_result(tally)

    def _admitting(self) -> _Tally | None:
        """The tally for one more evaluation completion; None if it has to wait."""
        num_running = self._charged.num_running + self._others.num_running
        if num_running < self._num_slots or self._is_closed:
            return self._others
        return self._charged if self._is_below_share() else None

    def _is_below_share(self) -> bool:
        """Whether the share is kept with one more, if all have the mean length when they finish."""
        mean_tokens = self._charged.mean_tokens or self._others.mean_tokens
        num_unfinished = self._charged.num_running + 1
        expected = self._charged.num_tokens + num_unfinished * mean_tokens
        return 0 < expected <= self._max_share * (self._others.num_tokens + expected)
