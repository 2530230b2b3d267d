"""Runs one lease: screening, gate, continuation, scoring."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from speed_async.actors.engine import Engine, GenerationRequest
from speed_async.actors.failed_completions import FailedCompletions
from speed_async.config.schema import Config
from speed_async.errors import ModelError, TaskError
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
    VerifierOutcome,
)

PRIORITY = {Phase.EVALUATION: 0, Phase.CONTINUATION: 1, Phase.SCREENING: 2}
"""Lower values are served first: finishing a group takes precedence over starting one. The
service bounds the tokens of evaluations (buffer/evaluation_budget.py)."""


class Scorer(Protocol):
    """Scores all completions of one prompt's phase; raises TaskError if the verifier itself is
    broken (environments/verifier.py)."""

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]: ...


class Codec(Protocol):
    """Encodes prompts and decodes completions (actors/prompt_codec.py)."""

    def encode(self, text: str) -> Int32Array:
        """Token ids (P,). Raises ModelError when the prompt cannot be encoded."""
        ...

    def decode(self, token_ids: Int32Array) -> str: ...


class Aborted(Exception):
    """The engine aborted a completion: the actor drains, or the group is too stale to train on."""


class UnscoredCompletions(TaskError):
    """Completions of a training group have no verdict, so the group has neither a gate decision nor
    baselines. The text begins with `verifier timeout:` or `verifier error:`."""


@dataclass(slots=True)
class LeaseProgress:
    """Progress of one lease. Its tokens are in flight until its result is sent."""

    lease: Lease
    samples: list[Sampled] = field(default_factory=list)
    """All samples, in the order in which they finished."""
    completions: list[Completion] = field(default_factory=list)
    """Scored completions, in the order in which they were requested."""
    unscored: list[Verdict] = field(default_factory=list)
    """Verdicts of the completions that the verifier could not score."""
    verified: list[tuple[Sampled, VerifierOutcome]] = field(default_factory=list)
    """Completions that the verifier was called for."""
    num_tokens: int = 0
    """Total tokens of `samples`; cached, because every message's counts include it."""
    num_waiting: int = 0
    """Requests that the engine has not returned yet."""
    stopped: bool = False
    """No further requests are submitted: the engine is, or will be, paused permanently."""
    scoring: bool = False
    """Waiting for the verifier, with no request in the engine."""
    continuing: bool = False
    """A training group that passed the gate."""

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version of all sampled tokens; None when there are none."""
        versions = [int(s.policy_versions.min()) for s in self.samples if s.num_tokens]
        return min(versions, default=None)

    @property
    def newest_version(self) -> int:
        """Newest policy version of all sampled tokens; 0 when there are none."""
        versions = [int(s.policy_versions.max()) for s in self.samples if s.num_tokens]
        return max(versions, default=0)

    @property
    def num_passed(self) -> int:
        return sum(completion.passed for completion in self.completions)

    @property
    def num_truncated(self) -> int:
        """Completions truncated by a length limit."""
        return sum(sample.finish_reason == "length" for sample in self.samples)

    @property
    def num_truncated_passed(self) -> int:
        return sum(each.passed and each.is_truncated for each in self.completions)

    def add(self, sample: Sampled) -> None:
        self.samples.append(sample)
        self.num_tokens += sample.num_tokens


class Rollout:
    """Runs leases on the engine and the verifier."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        scorer: Scorer,
        codec: Codec,
        *,
        suite_scorers: Mapping[str, Scorer] = MappingProxyType({}),
        failures: FailedCompletions | None = None,
    ) -> None:
        """`failures` records the completions that could not be scored."""
        self._config = config
        self._engine = engine
        self._scorer = scorer
        self._codec = codec
        self._failures = failures
        self._suite_scorers = suite_scorers
        """Of the suites other than the held-out prompts."""

    async def run(self, work: LeaseProgress, prompt: Prompt) -> Group | None:
        """The group, or None: the gate rejected the prompt, or the lease is an evaluation. `work`
        then has the outcome.

        Raises UnscoredCompletions (of a training lease), TaskError (broken verifier), ModelError
        (unusable prompt) or Aborted.
        """
        tokens = self._codec.encode(prompt.text)
        if work.lease.kind is LeaseKind.EVALUATION:
            await self._phase(work, prompt, tokens, Phase.EVALUATION, work.lease.num_samples)
            return None
        limit = self._config.task.max_prompt_tokens
        if limit is not None and len(tokens) > limit:
            raise ModelError(
                f"it has {len(tokens):,} tokens, more than task.max_prompt_tokens = {limit:,}"
            )
        gate = self._config.gate
        if gate.num_screening:
            await self._phase(work, prompt, tokens, Phase.SCREENING, gate.num_screening)
            if not gate.admits(work.num_passed, gate.num_screening):
                return None
        work.continuing = True
        num_left = gate.group_size - gate.num_screening
        if num_left:
            await self._phase(work, prompt, tokens, Phase.CONTINUATION, num_left)
        return Group(
            lease_id=work.lease.lease_id,
            prompt_id=prompt.prompt_id,
            prompt_token_ids=tokens,
            completions=tuple(work.completions),
            num_screening=gate.num_screening,
        )

    def text(self, sampled: Sampled) -> str:
        """Decoded text of a sample."""
        return self._codec.decode(sampled.token_ids)

    async def _phase(
        self, work: LeaseProgress, prompt: Prompt, tokens: Int32Array, phase: Phase, count: int
    ) -> None:
        """Generate and score `count` completions, which are added to `work`."""
        is_training = phase is not Phase.EVALUATION
        temperature, top_p = self._config.sampling(work.lease.suite)
        request = GenerationRequest(
            prompt_token_ids=tokens,
            max_staleness=self._config.buffer.max_staleness if is_training else None,
            oldest_version=work.oldest_version if is_training else None,
            max_new_tokens=self._config.actors.max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            priority=PRIORITY[phase],
        )
        work.num_waiting += count
        results = await asyncio.gather(
            *(self._generate(work, request) for _ in range(count)), return_exceptions=True
        )
        samples: list[Sampled] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            samples.append(result)
        if any(sample.finish_reason == "abort" for sample in samples):
            raise Aborted
        verdicts = await self._score(work, prompt, samples)
        # Not `work.samples`, which is in finishing order.
        work.completions += [
            _completion(sample, verdict)
            for sample, verdict in zip(samples, verdicts, strict=True)
            if verdict.outcome == "scored"
        ]
        work.unscored += [verdict for verdict in verdicts if verdict.outcome != "scored"]
        if work.unscored and is_training:
            first = work.unscored[0]
            raise UnscoredCompletions(
                f"verifier {first.outcome}: {len(work.unscored)} of {len(samples)} completions of "
                f"training prompt {prompt.prompt_id}: {first.error}"
            )

    async def _score(
        self, work: LeaseProgress, prompt: Prompt, samples: Sequence[Sampled]
    ) -> list[Verdict]:
        """Verdicts on all samples. Truncated samples are not verified, unless the configuration
        says so or they are of a suite of the configuration."""
        chosen = self._config.task
        suite_scorer = self._suite_scorers.get(work.lease.suite)
        score_truncated = chosen.score_truncated or suite_scorer is not None
        verdicts = [Verdict(reward=chosen.truncated_reward, passed=False)] * len(samples)
        verified = [
            index
            for index, sample in enumerate(samples)
            if sample.finish_reason != "length" or score_truncated
        ]
        if not verified:
            return verdicts
        texts = self._texts([samples[index] for index in verified])
        work.scoring = True
        try:
            scored = await (suite_scorer or self._scorer).score(prompt, texts)
        except TaskError as error:
            work.verified.extend((samples[index], "error") for index in verified)
            await self._record_failures(prompt, [(text, str(error)) for text in texts])
            raise
        finally:
            work.scoring = False
        for index, verdict in zip(verified, scored, strict=True):
            verdicts[index] = verdict
            work.verified.append((samples[index], verdict.outcome))
        pairs = zip(texts, scored, strict=True)
        await self._record_failures(
            prompt, [(text, each.error) for text, each in pairs if each.outcome != "scored"]
        )
        return verdicts

    def _texts(self, samples: Sequence[Sampled]) -> list[str]:
        """Decoded texts. Equal completions, which a group has many of, are decoded once."""
        keys = [sample.token_ids.tobytes() for sample in samples]
        distinct = dict(zip(keys, samples, strict=True))
        texts = {key: self.text(sample) for key, sample in distinct.items()}
        return [texts[key] for key in keys]

    async def _record_failures(self, prompt: Prompt, errors: Sequence[tuple[str, str]]) -> None:
        """Record completions with the reasons why they were not scored."""
        if self._failures is not None and errors:
            await asyncio.to_thread(self._failures.record, prompt, errors)

    async def _generate(self, work: LeaseProgress, request: GenerationRequest) -> Sampled:
        try:
            if work.stopped:
                raise Aborted
            sample = await self._engine.generate(request)
        finally:
            work.num_waiting -= 1
        # No await between the engine's return and this line keeps the token counts consistent.
        work.add(sample)
        return sample


def _completion(sample: Sampled, verdict: Verdict) -> Completion:
    return Completion(
        sampled=sample,
        reward=verdict.reward,
        passed=verdict.passed,
        parts=verdict.parts,
        extracted=verdict.extracted,
    )
