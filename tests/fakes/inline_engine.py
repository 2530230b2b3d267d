"""What a simulated run needs of an actor: an engine in the caller's event loop, a codec and a
scorer of scripted completions."""

import asyncio
from collections.abc import Sequence

import numpy as np

from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.testing.scripted_engine import ScriptedStepper
from speed_async.types import Int32Array, Prompt, Sampled, Verdict, WeightOffer


class InlineEngine:
    """Implements what a rollout needs of `Engine`, in the caller's event loop. `step` is one decode
    step."""

    def __init__(self, stepper: ScriptedStepper) -> None:
        self._stepper = stepper
        self._returned: dict[int, asyncio.Future[Sampled]] = {}
        self._num_requests = 0

    @property
    def stats(self) -> EngineStats:
        return self._stepper.stats()

    async def generate(self, request: GenerationRequest) -> Sampled:
        self._num_requests += 1
        self._returned[self._num_requests] = returned = asyncio.Future()
        self._stepper.submit(self._num_requests, request)
        return await returned

    def step(self) -> None:
        for finished in self._stepper.step():
            self._returned.pop(finished.key).set_result(finished.sampled)

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        for finished in self._stepper.abort_stale(offer.policy_version):
            self._returned.pop(finished.key).set_result(finished.sampled)
        self._stepper.load_weights(offer)
        return UpdateReport(policy_version=offer.policy_version, transfer_s=0.0, pause_s=0.0)

    async def pause(self, *, abort: bool) -> None: ...

    async def resume(self) -> None: ...


class IdCodec:
    """A prompt is one token, its id."""

    def encode(self, text: str) -> Int32Array:
        return np.array([int(text)], np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return str(token_ids[-1])


class LastTokenScorer:
    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        return [Verdict(reward=float(text), passed=text == "1") for text in completions]
