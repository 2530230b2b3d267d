"""A fake engine: scripted completions through the real `SteppedEngine`, with recorded calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepped_engine.admission import ModelLimits, WaitingQueue, sequence_limit
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.stepper import FinishedRequest, empty_sample
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.types import FinishReason, Sampled, WeightOffer

Script = Callable[[GenerationRequest, int], Sequence[int]]
"""Maps a request and the number of earlier requests to token ids."""

ANY_TOKEN_ID = 2**31
SCRIPTED_LOGPROB = -0.5
"""log mu of every scripted token."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A running request: its script and the versions of the tokens sampled so far."""

    request: GenerationRequest
    script: list[int]
    limit: int
    policy_versions: list[int] = field(default_factory=list)

    @property
    def first_version(self) -> int | None:
        return self.policy_versions[0] if self.policy_versions else None

    @property
    def finish_reason(self) -> FinishReason | None:
        if len(self.policy_versions) == len(self.script):
            return "stop"
        return "length" if len(self.policy_versions) == self.limit else None


class ScriptedStepper:
    """Implements `Stepper`: one token of each running script per step, without model or torch."""

    def __init__(
        self,
        script: Script,
        *,
        num_slots: int,
        context_length: int,
        receive: Callable[[WeightOffer], float],
        has_valid_weights: Callable[[], bool] = lambda: True,
        num_token_ids: int = ANY_TOKEN_ID,
    ) -> None:
        self.limits = ModelLimits(context_length=context_length, num_token_ids=num_token_ids)
        self._script = script
        self._receive = receive
        self._is_whole = has_valid_weights
        self._num_slots = num_slots
        self._waiting = WaitingQueue()
        self._rows: dict[int, _Row] = {}
        self._policy_version = 0
        self._tokens_generated = 0
        self._num_started = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._rows or len(self._waiting))

    @property
    def has_valid_weights(self) -> bool:
        return self._is_whole()

    def submit(self, key: int, request: GenerationRequest) -> None:
        self._waiting.push(key, request)

    def cancel(self, key: int) -> int:
        if self._waiting.remove(key) or key not in self._rows:
            return 0
        return len(self._rows.pop(key).policy_versions)

    def step(self) -> list[FinishedRequest]:
        while len(self._waiting) and len(self._rows) < self._num_slots:
            self._start(*self._waiting.pop())
        for row in self._rows.values():
            if row.finish_reason is None:
                row.policy_versions.append(self._policy_version)
                self._tokens_generated += 1
        self._num_steps += 1
        return [
            self._end(key, finish_reason)
            for key, row in list(self._rows.items())
            if (finish_reason := row.finish_reason) is not None
        ]

    def abort(self) -> list[FinishedRequest]:
        finished = [self._end(key, "abort") for key in list(self._rows)]
        while len(self._waiting):
            finished.append(FinishedRequest(key=self._waiting.pop()[0], sampled=empty_sample()))
        return finished

    def abort_stale(self, policy_version: int) -> list[FinishedRequest]:
        finished = [
            self._end(key, "abort")
            for key, row in list(self._rows.items())
            if row.request.is_stale(row.first_version, policy_version)
        ]
        for key in self._waiting.stale_keys(policy_version):
            self._waiting.remove(key)
            finished.append(FinishedRequest(key=key, sampled=empty_sample()))
        return finished

    def load_weights(self, offer: WeightOffer) -> float:
        transfer_s = self._receive(offer)
        self._policy_version = offer.policy_version
        return transfer_s

    def stats(self) -> EngineStats:
        return EngineStats(
            tokens_generated=self._tokens_generated,
            tokens_running=sum(len(row.policy_versions) for row in self._rows.values()),
            num_running=len(self._rows),
            num_waiting=len(self._waiting),
            num_slots=self._num_slots,
            policy_version=self._policy_version,
            steps=self._num_steps,
        )

    def _start(self, key: int, request: GenerationRequest) -> None:
        limit = sequence_limit(request, self.limits) - len(request.prompt_token_ids)
        script = list(self._script(request, self._num_started))
        self._rows[key] = _Row(request=request, script=script, limit=limit)
        self._num_started += 1

    def _end(self, key: int, finish_reason: FinishReason) -> FinishedRequest:
        row = self._rows.pop(key)
        count = len(row.policy_versions)
        sampled = Sampled(
            token_ids=np.array(row.script[:count], np.int32),
            logprobs=np.full(count, SCRIPTED_LOGPROB, np.float32),
            policy_versions=np.array(row.policy_versions, np.int32),
            finish_reason=finish_reason,
        )
        return FinishedRequest(key=key, sampled=sampled)


class ScriptedEngine(SteppedEngine):
    """Implements `Engine`; returns the tokens of `script` and records every call.

    A script within max_new_tokens finishes with "stop"; a longer one is truncated and finishes
    with "length". An error in `script` is an engine failure, an error in `receive` a failed update.
    `receive` may take part in a broadcast and returns its seconds.
    """

    def __init__(
        self,
        script: Script,
        *,
        num_slots: int = 64,
        context_length: int = 1024,
        num_token_ids: int = ANY_TOKEN_ID,
        receive: Callable[[WeightOffer], float] = lambda offer: 0.0,
    ) -> None:
        def make_stepper() -> ScriptedStepper:
            return ScriptedStepper(
                script,
                num_slots=num_slots,
                context_length=context_length,
                num_token_ids=num_token_ids,
                receive=receive,
            )

        super().__init__(ThreadWorker(make_stepper))
        self.requests: list[GenerationRequest] = []
        self.offers: list[WeightOffer] = []
        self.pauses: list[bool] = []
        """The `abort` argument of every pause."""
        self.num_resumes = 0

    async def generate(self, request: GenerationRequest) -> Sampled:
        self.requests.append(request)
        return await super().generate(request)

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        self.offers.append(offer)
        return await super().update_weights(offer)

    async def pause(self, *, abort: bool) -> None:
        self.pauses.append(abort)
        await super().pause(abort=abort)

    async def resume(self) -> None:
        self.num_resumes += 1
        await super().resume()
