"""Unusable prompts: each fails once with a warning, and a run without usable prompts ends."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from speed_async.buffer.curriculum.curriculum import (
    CurriculumState,
    UniformCurriculum,
    UniformState,
)
from speed_async.buffer.curriculum.posterior import PosteriorCurriculum, PosteriorState
from speed_async.buffer.service import BufferService
from speed_async.environments.task import data_fingerprint
from speed_async.errors import RoleError
from speed_async.transport import messages as m
from speed_async.types import Prompt
from tests.fakes.buffer_fixtures import make_config, posterior, restored
from tests.fakes.loop_run import DigitTask, Run
from tests.fakes.service_harness import ServiceHarness, failed, kinds

TOO_LONG = "prompt: the prompt has 120 tokens and the context holds 96"
CONTEXT_LENGTH = 1024
"""Context length of the scripted engine."""


@pytest.mark.parametrize("kind", ["uniform", "posterior"])
def test_retired_prompt_is_never_chosen_again(kind: str) -> None:
    def make(state: CurriculumState) -> UniformCurriculum | PosteriorCurriculum:
        if isinstance(state, UniformState):
            return UniformCurriculum(6, state)
        return posterior(6, state=state)

    rng = np.random.default_rng(0)
    state = UniformState(rng=rng) if kind == "uniform" else PosteriorState.new(6, rng)
    curriculum = make(state)
    first = curriculum.choose(6)
    curriculum.give_back(first[0])
    for prompt_id in (first[0], first[1], first[1]):  # the first is queued again
        curriculum.record(prompt_id, 0, 0)
        curriculum.retire(prompt_id)
    for prompt_id in first[:3]:  # a late result of another lease has no effect
        curriculum.record(prompt_id, 1, 4)
        curriculum.give_back(prompt_id)
    left = set(first[2:])
    assert curriculum.num_left == 4
    assert set(curriculum.choose(4)) == left
    assert set(curriculum.choose(9)) == left  # more leases than prompts
    other = make(restored(state))
    assert other.num_left == 4
    assert other.choose(5) == curriculum.choose(5)
    for prompt_id in left:
        curriculum.retire(prompt_id)
    assert curriculum.num_left == 0
    assert curriculum.choose(3) == []


def test_unusable_prompt_fails_once_with_a_warning(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 100})
    harness.pass_baseline()
    leases = harness.lease(100)
    assert len(leases.prompt_ids) == 100
    bad = [leases.prompt_ids[5], leases.prompt_ids[9]]
    for lease_id, prompt_id in zip(leases.lease_ids, leases.prompt_ids, strict=True):
        harness.send("actor-1.0", failed(lease_id, TOO_LONG if prompt_id in bad else "verifier: x"))
    expected = (
        f"2 training prompts cannot be used (left out); first prompt {bad[0]}: the prompt has"
    )
    assert harness.service.warning.startswith(expected)
    later = harness.lease(98)
    assert set(later.prompt_ids) == set(range(100)) - set(bad)
    assert harness.service.lifecycle.ledger.failures == {"prompt": 2, "verifier": 98}


def test_unusable_held_out_prompt_counts_as_not_passed_with_a_warning(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path, num_held_out=2)
    harness.hello("learner", 0)
    harness.hello("actor-1.0", 1)
    leases = harness.lease(2)
    assert leases.kind == "evaluation"
    for lease_id in leases.lease_ids:
        harness.send("actor-1.0", failed(lease_id, TOO_LONG))
    [evaluation] = [event for event in harness.events if event.kind == "evaluation"]
    assert (evaluation.values["num_passed"], evaluation.values["num_completions"]) == (0, 2)
    assert harness.service.warning.startswith(
        "2 held-out prompts cannot be used (counted as not passed); first prompt 0: the prompt has"
    )
    assert harness.service.lifecycle.unusable.num_held_out == 2


def test_run_without_a_usable_prompt_ends_immediately_with_the_reason(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 100})
    harness.pass_baseline()
    leases = harness.lease(100)
    for lease_id in leases.lease_ids[:-1]:
        assert not harness.send("actor-1.0", failed(lease_id, TOO_LONG))
    assert not harness.service.ended
    answers = harness.send("actor-1.0", failed(leases.lease_ids[-1], TOO_LONG))
    assert harness.service.ended and kinds(answers) == ["Abort", "Abort"]
    message = answers[0][1]
    assert isinstance(message, m.Abort)
    assert message.message.startswith(
        f"no training prompt can be used: all 100 of them failed; first prompt "
        f"{leases.prompt_ids[0]}: the prompt has 120 tokens"
    )


def unusable_run(folder: Path, bad: set[int]) -> Run:
    """A run in which the training prompts `bad` are longer than the engine's context."""
    (folder / "config.json").write_text("{}")
    config = make_config(
        str(folder),
        run={"updates": 5},
        actors={"slots": 16, "max_new_tokens": 8},
        evaluate={"every": 0, "num_samples": 2},
    )
    run = Run(config, 1)
    long = "x" * (CONTEXT_LENGTH + 1)
    run.task.train_prompts = [
        Prompt(
            prompt_id=prompt.prompt_id,
            text=f"{prompt.prompt_id}{long}" if prompt.prompt_id in bad else prompt.text,
            answer=prompt.answer,
        )
        for prompt in run.task.train_prompts
    ]
    run.service = service_of(run.task, run)
    return run


def service_of(task: DigitTask, run: Run) -> BufferService:
    return BufferService(
        run.config,
        num_prompts=len(task.train_prompts),
        num_held_out=4,
        fingerprint=data_fingerprint(task, {}),
        started_s=0.0,
    )


def test_run_continues_without_the_prompts_that_are_too_long(tmp_path: Path) -> None:
    run = unusable_run(tmp_path, bad={0, 1, 2, 3, 4})
    finished = asyncio.run(asyncio.wait_for(run.execute(), 60))
    assert finished.outcome == "completed" and finished.progress.optimizer_updates == 5
    unusable = run.service.lifecycle.unusable
    assert 0 < unusable.num_training <= 5
    assert run.service.lifecycle.ledger.failures["prompt"] == unusable.num_training


def test_run_in_which_all_prompts_are_too_long_ends_with_the_reason(tmp_path: Path) -> None:
    run = unusable_run(tmp_path, bad=set(range(100)))
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(run.execute(), 60))
    errors = caught.value.exceptions
    assert all(isinstance(error, RoleError) for error in errors)
    assert all("no training prompt can be used: all 30" in str(error) for error in errors)
    assert all("shorten the prompt or raise model.context_length" in str(e) for e in errors)
    assert all("(prompt starts with '" in str(error) and "xxxx'" in str(error) for error in errors)
