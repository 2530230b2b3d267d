"""Generates, scores and records the missing samples of one suite.

`NUM_PER_SLOT` requests per slot of the engine are in progress at a time. Each is recorded when it
is scored, so a process that is killed loses only those.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from speed_async.actors.engine import Engine, GenerationRequest
from speed_async.actors.prompt_codec import PromptCodec
from speed_async.actors.rollout import Scorer
from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.records import SampleFile, SampleRecord
from speed_async.launcher.evaluation.suites import Suite
from speed_async.types import Int32Array, Prompt, Sampled

NUM_PER_SLOT = 2
"""One in the engine, and one that waits for it or for the verifier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """What samples are made with."""

    engine: Engine
    verifier: Scorer
    codec: PromptCodec
    seed: int
    num_concurrent: int


@dataclass(frozen=True, slots=True)
class _Missing:
    prompt: Prompt
    token_ids: Int32Array  # (P,)
    sample: int


async def sample_suite(
    suite: Suite,
    prompts_token_ids: Sequence[Int32Array],
    file: SampleFile,
    sampler: Sampler,
    on_sample: Callable[[SampleRecord], None],
) -> None:
    """Add all samples that `file` does not have, `suite.num_samples` per prompt.

    `prompts_token_ids`: of each prompt of the suite. Raises the engine's errors, and OSError when
    a sample cannot be written.
    """
    present = {record.key for record in file.records}
    missing = iter(
        [
            _Missing(prompt, token_ids, sample)
            for prompt, token_ids in zip(suite.prompts, prompts_token_ids, strict=True)
            for sample in range(suite.num_samples)
            if (prompt.prompt_id, sample) not in present
        ]
    )
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(sampler.num_concurrent):
                group.create_task(_work(suite, missing, file, sampler, on_sample))
    except* (SpeedAsyncError, OSError) as errors:
        raise _first(errors) from None


async def _work(
    suite: Suite,
    missing: Iterator[_Missing],
    file: SampleFile,
    sampler: Sampler,
    on_sample: Callable[[SampleRecord], None],
) -> None:
    for each in missing:
        sampled = await sampler.engine.generate(
            GenerationRequest(
                prompt_token_ids=each.token_ids,
                max_new_tokens=suite.max_new_tokens,
                temperature=suite.temperature,
                top_p=suite.top_p,
                priority=0,
                seed=sample_seed(sampler.seed, each.prompt.prompt_id, each.sample),
            )
        )
        record = await _scored(suite, each, sampled, sampler)
        file.append(record)
        on_sample(record)


def sample_seed(seed: int, prompt_id: int, sample: int) -> int:
    """Seed of one sample, in [0, 2^63); the order in which samples are made does not matter."""
    state = np.random.SeedSequence([seed, prompt_id, sample]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


async def _scored(suite: Suite, each: _Missing, sampled: Sampled, sampler: Sampler) -> SampleRecord:
    text = sampler.codec.decode(sampled.token_ids)
    record = SampleRecord(
        prompt_id=each.prompt.prompt_id,
        sample=each.sample,
        level=each.prompt.level,
        num_tokens=sampled.num_tokens,
        finish_reason=sampled.finish_reason,
        outcome="scored",
        reward=0.0,
        passed=False,
        extracted=None,
        answer=each.prompt.answer,
        text=text,
    )
    if sampled.finish_reason == "length" and not suite.score_truncated:
        return record
    return await with_verdict(record, each.prompt, sampler.verifier)


async def with_verdict(record: SampleRecord, prompt: Prompt, verifier: Scorer) -> SampleRecord:
    """The record with the verdict on its text. A completion that cannot be scored has no reward.

    Raises TaskError when the verifier itself is broken.
    """
    [verdict] = await verifier.score(prompt, [record.text])
    return replace(
        record,
        outcome=verdict.outcome,
        reward=verdict.reward if verdict.outcome == "scored" else None,
        passed=verdict.passed,
        extracted=verdict.extracted,
        error=verdict.error,
    )


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group of tasks; the others follow from it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
