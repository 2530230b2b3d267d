"""One lease from its prompt to its result: screen, gate, continue, score."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from speed_async.actors.engine import Engine, GenerationRequest
from speed_async.actors.failed_completions import FailedCompletions
from speed_async.algorithms.gate import Gate, num_passed
from speed_async.config.schema import Config
from speed_async.errors import TaskError
from speed_async.types import (
    Completion,
    Group,
    Int32Array,
    Lease,
    LeaseKind,
    Phase,
    Prompt,
    Sampled,
    Verdict,
)

PRIORITY = {Phase.EVALUATION: 0, Phase.CONTINUATION: 1, Phase.SCREENING: 2}
"""Lower goes first: finishing a group beats beginning one."""


class Scorer(Protocol):
    """Scores all completions of one prompt's phase; raises TaskError (environments/verifier.py)."""

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]: ...


class Codec(Protocol):
    """Text to tokens and back (actors/prompt_codec.py)."""

    def encode(self, text: str) -> Int32Array: ...
    def decode(self, token_ids: Int32Array) -> str: ...


class Aborted(Exception):
    """The engine gave a completion back unfinished: the actor drains, or its group is too old to
    be trained on."""


@dataclass(slots=True)
class LeaseWork:
    """What one lease has produced so far. Its tokens are in flight until its result is sent."""

    lease: Lease
    samples: list[Sampled] = field(default_factory=list)
    """In the order in which they ended."""
    completions: list[Completion] = field(default_factory=list)
    """Those that were scored, in the order in which they were asked for."""
    num_tokens: int = 0
    """Of all samples; kept, because every message's counts ask for it."""
    num_waiting: int = 0
    """Requests that the engine has not answered yet."""
    stopped: bool = False
    """Submit nothing more: the engine is, or will be, paused for good."""
    scoring: bool = False
    """Waits for the verifier, with no request in the engine."""
    continuing: bool = False
    """A training group past the gate."""

    @property
    def oldest_version(self) -> int | None:
        """Of the tokens of all samples; None when there are none."""
        versions = [int(s.policy_versions.min()) for s in self.samples if s.num_tokens]
        return min(versions, default=None)

    def add(self, sample: Sampled) -> None:
        self.samples.append(sample)
        self.num_tokens += sample.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Screened, and not of moderate difficulty."""

    num_passed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An evaluation lease's completions."""

    num_passed: int
    oldest_version: int
    newest_version: int


class Rollout:
    """Runs leases against the engine and the verifier. Holds no state between leases."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        scorer: Scorer,
        codec: Codec,
        *,
        failures: FailedCompletions | None = None,
    ) -> None:
        """`failures` keeps what could not be scored."""
        self._config = config
        self._engine = engine
        self._scorer = scorer
        self._codec = codec
        self._failures = failures
        self._gate = Gate(low=config.gate.low, high=config.gate.high)

    async def run(self, work: LeaseWork, prompt: Prompt) -> Group | Refused | Scored:
        """Raises TaskError (verifier), ModelError (prompt does not fit) or Aborted."""
        tokens = self._codec.encode(prompt.text)
        if work.lease.kind is LeaseKind.EVALUATION:
            return await self._evaluate(work, prompt, tokens)
        gate = self._config.gate
        completions: list[Completion] = []
        if gate.num_screening:
            completions = await self._phase(
                work, prompt, tokens, Phase.SCREENING, gate.num_screening
            )
            rewards = [completion.reward for completion in completions]
            if not self._gate.admits(rewards):
                return Refused(num_passed=num_passed(rewards))
        work.continuing = True
        num_left = gate.group_size - gate.num_screening
        if num_left:
            completions += await self._phase(work, prompt, tokens, Phase.CONTINUATION, num_left)
        return Group(
            lease_id=work.lease.lease_id,
            prompt_id=prompt.prompt_id,
            prompt_token_ids=tokens,
            completions=tuple(completions),
            num_screening=gate.num_screening,
        )

    def text(self, sampled: Sampled) -> str:
        """What a sample says."""
        return self._codec.decode(sampled.token_ids)

    async def _evaluate(self, work: LeaseWork, prompt: Prompt, tokens: Int32Array) -> Scored:
        completions = await self._phase(
            work, prompt, tokens, Phase.EVALUATION, work.lease.num_samples
        )
        versions = np.concatenate([sample.policy_versions for sample in work.samples])
        return Scored(
            num_passed=num_passed([completion.reward for completion in completions]),
            oldest_version=int(versions.min(initial=np.iinfo(np.int32).max)),
            newest_version=int(versions.max(initial=0)),
        )

    async def _phase(
        self, work: LeaseWork, prompt: Prompt, tokens: Int32Array, phase: Phase, count: int
    ) -> list[Completion]:
        """Generate and score `count` completions."""
        trained_on = phase is not Phase.EVALUATION
        request = GenerationRequest(
            prompt_token_ids=tokens,
            max_staleness=self._config.buffer.max_staleness if trained_on else None,
            oldest_version=work.oldest_version if trained_on else None,
            max_new_tokens=self._config.actors.max_new_tokens,
            temperature=self._config.actors.temperature,
            top_p=self._config.actors.top_p,
            priority=PRIORITY[phase],
        )
        work.num_waiting += count
        answers = await asyncio.gather(
            *(self._one(work, request) for _ in range(count)), return_exceptions=True
        )
        samples: list[Sampled] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            samples.append(answer)
        if any(sample.finish_reason == "abort" for sample in samples):
            raise Aborted
        verdicts = await self._score(work, prompt, samples)
        # `samples` and not `work.samples`: these are in the order in which they ended.
        completions = [
            Completion(sampled=sample, reward=verdict.reward, extracted=verdict.extracted)
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
        work.completions += completions
        return completions

    async def _score(
        self, work: LeaseWork, prompt: Prompt, samples: Sequence[Sampled]
    ) -> list[Verdict]:
        """On all samples; one that was cut off earns 0 and is not verified."""
        verdicts = [Verdict(reward=0.0)] * len(samples)
        verified = [
            place
            for place, sample in enumerate(samples)
            if sample.finish_reason != "length" or self._config.task.score_truncated
        ]
        if not verified:
            return verdicts
        texts = [self.text(samples[place]) for place in verified]
        work.scoring = True
        try:
            given = await self._scorer.score(prompt, texts)
        except TaskError as error:
            if self._failures is not None:
                await asyncio.to_thread(self._failures.keep, prompt, texts, str(error))
            raise
        finally:
            work.scoring = False
        for place, verdict in zip(verified, given, strict=True):
            verdicts[place] = verdict
        return verdicts

    async def _one(self, work: LeaseWork, request: GenerationRequest) -> Sampled:
        try:
            if work.stopped:
                raise Aborted
            sample = await self._engine.generate(request)
        finally:
            work.num_waiting -= 1
        # No await between the engine's return and this: the token counts stay in step.
        work.add(sample)
        return sample
