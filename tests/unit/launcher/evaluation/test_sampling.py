"""Sampling a suite: what is requested, what is recorded, and what a verifier's failure becomes."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from speed_async.actors.model_folder import load_tokenizer
from speed_async.actors.prompt_codec import PromptCodec
from speed_async.environments.rewards import unscored
from speed_async.environments.suite_task import SuiteTask
from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.records import SampleFile, SampleRecord
from speed_async.launcher.evaluation.sampling import Sampler, sample_suite
from speed_async.launcher.evaluation.suites import Suite
from speed_async.testing.scripted_engine import ScriptedEngine
from speed_async.testing.scripted_verifier import ScriptedVerifier
from speed_async.types import Prompt, Verdict
from tests.fakes.paths import MODEL

PROMPTS = [Prompt(prompt_id=i, text=str(i), answer="7", level=f"l{i}") for i in range(3)]
TOKEN_IDS = [np.array([1, 4 + i], np.int32) for i in range(3)]


class TimingOutVerifier(ScriptedVerifier):
    """Prompt 1 has no verdict."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, completion: 1.0)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        if prompt.prompt_id == 1:
            return [unscored("timeout", "did not return within 10 s")]
        return await super().score(prompt, completions)


def suite(*, score_truncated: bool) -> Suite:
    return Suite(
        name="s",
        prompts=PROMPTS,
        format="{prompt}",
        num_samples=2,
        temperature=0.5,
        top_p=1.0,
        max_new_tokens=5,
        score_truncated=score_truncated,
        match="exact",
        make_task=partial(SuiteTask, "exact"),
        verifier_digest="v",
    )


def sampled(
    folder: Path, engine: ScriptedEngine, *, score_truncated: bool = True
) -> list[SampleRecord]:
    """The records of a suite whose first sample was made by an earlier process."""
    records: list[SampleRecord] = []

    async def run(file: SampleFile) -> None:
        async with engine:
            sampler = Sampler(
                engine=engine,
                verifier=TimingOutVerifier(),
                codec=PromptCodec(load_tokenizer(MODEL), chat_template=False),
                seed=3,
                num_concurrent=4,
            )
            chosen = suite(score_truncated=score_truncated)
            await sample_suite(chosen, TOKEN_IDS, file, sampler, records.append)

    with SampleFile(folder / "s.jsonl", {}) as file:
        asyncio.run(run(file))
    return sorted(records, key=lambda each: each.key)


def test_missing_samples_are_requested_with_seeds_of_their_own(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request, _: [5, 6])
    records = sampled(tmp_path, engine)
    assert [each.key for each in records] == [(i, j) for i in range(3) for j in range(2)]
    assert len({request.seed for request in engine.requests}) == 6
    assert {request.temperature for request in engine.requests} == {0.5}
    kept = records[:2] + records[3:]
    (tmp_path / "s.jsonl").write_text("".join(each.line() for each in kept))
    engine = ScriptedEngine(lambda request, _: [5, 6])
    [again] = sampled(tmp_path, engine)
    assert again == records[2]


def test_a_completion_without_a_verdict_has_no_reward(tmp_path: Path) -> None:
    records = sampled(tmp_path, ScriptedEngine(lambda request, _: [5, 6]))
    assert [(each.outcome, each.reward, each.passed) for each in records[2:4]] == [
        ("timeout", None, False)
    ] * 2
    assert records[2].error == "did not return within 10 s"
    assert [(each.reward, each.passed, each.level) for each in records[4:]] == [
        (1.0, True, "l2")
    ] * 2


def test_truncated_completions_are_scored_as_the_suite_says(tmp_path: Path) -> None:
    def script(request: object, _: int) -> list[int]:
        return [5] * 9

    scored = sampled(tmp_path / "a", ScriptedEngine(script))
    assert scored[0].is_truncated and scored[0].num_tokens == 5 and scored[0].passed
    unscored_ones = sampled(tmp_path / "b", ScriptedEngine(script), score_truncated=False)
    assert {(each.passed, each.reward, each.outcome) for each in unscored_ones} == {
        (False, 0.0, "scored")
    }


def test_an_error_of_the_engine_ends_the_evaluation(tmp_path: Path) -> None:
    def script(request: object, num_earlier: int) -> list[int]:
        raise SpeedAsyncError("the model returned non-finite logits")

    with pytest.raises(SpeedAsyncError, match="non-finite logits"):
        sampled(tmp_path, ScriptedEngine(script))
