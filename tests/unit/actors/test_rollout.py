"""Rollout of one lease: assignment of rewards to completions, and truncation."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from speed_async.actors.engine import GenerationRequest
from speed_async.actors.lease_result import result_message
from speed_async.actors.reward_report import RewardReport
from speed_async.actors.rollout import LeaseProgress, Rollout, Scorer, UnscoredCompletions
from speed_async.config.schema import Config
from speed_async.environments.outcome_lengths import OutcomeLengths
from speed_async.environments.rewards import unscored
from speed_async.errors import ModelError
from speed_async.testing.scripted_engine import ScriptedEngine
from speed_async.testing.scripted_verifier import ScriptedVerifier
from speed_async.transport import messages as m
from speed_async.types import (
    ActorCounts,
    Group,
    Int32Array,
    Lease,
    LeaseKind,
    Prompt,
    Verdict,
)
from tests.fakes.buffer_fixtures import make_config, make_suite

PROMPT = Prompt(prompt_id=0, text="p", answer="")


class IntCodec:
    """One token per character of a prompt."""

    def encode(self, text: str) -> Int32Array:
        return np.arange(len(text), dtype=np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return " ".join(map(str, token_ids.tolist()))


def run_lease(
    config: Config,
    script: Callable[[GenerationRequest, int], list[int]],
    verifier: Scorer,
    *,
    kind: LeaseKind = LeaseKind.TRAINING,
    num_samples: int = 0,
    suite: str = "",
    suite_scorers: Mapping[str, Scorer] = MappingProxyType({}),
    prompt: Prompt = PROMPT,
) -> tuple[Group | None, LeaseProgress]:
    async def scenario() -> tuple[Group | None, LeaseProgress]:
        lease = Lease(lease_id=0, prompt_id=0, kind=kind, num_samples=num_samples, suite=suite)
        async with ScriptedEngine(script, num_slots=8) as engine:
            rollout = Rollout(config, engine, verifier, IntCodec(), suite_scorers=suite_scorers)
            work = LeaseProgress(lease=lease)
            return await rollout.run(work, prompt), work

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_rewards_match_completions_regardless_of_finish_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))  # 2 screening and 2 continuation completions

    def earlier_finishes_later(request: GenerationRequest, number: int) -> list[int]:
        return [number] * (9 - 2 * number)

    verifier = ScriptedVerifier(lambda _, completion: float(completion[0] in "03"))
    group, _ = run_lease(config, earlier_finishes_later, verifier)
    assert isinstance(group, Group)
    first_tokens = [int(completion.sampled.token_ids[0]) for completion in group.completions]
    rewards = [completion.reward for completion in group.completions]
    assert dict(zip(first_tokens, rewards, strict=True)) == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
    assert sorted(first_tokens[:2]) == [0, 1]


def ends_in_the_answer(request: GenerationRequest, number: int) -> list[int]:
    """Every second completion exceeds its limit; the last token within the limit is 1."""
    return [7] * (request.max_new_tokens - 1) + [1] * (1 + number % 2)


def test_truncated_completions_get_zero_reward(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), actors={"max_new_tokens": 3})
    verifier = ScriptedVerifier(lambda _, completion: float(completion.endswith("1")))
    group, _ = run_lease(config, ends_in_the_answer, verifier)
    assert isinstance(group, Group)
    reasons = [completion.sampled.finish_reason for completion in group.completions]
    assert sorted(reasons) == ["length", "length", "stop", "stop"]
    for reason, completion in zip(reasons, group.completions, strict=True):
        assert completion.reward == (1.0 if reason == "stop" else 0.0)
    result, work = run_lease(
        config, ends_in_the_answer, verifier, kind=LeaseKind.EVALUATION, num_samples=4
    )
    assert result is None and work.num_passed == 2
    assert {text for call in verifier.calls for text in call.completions} == {"7 7 1"}


def test_verifier_is_not_called_when_all_completions_are_truncated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), actors={"max_new_tokens": 2})
    verifier = ScriptedVerifier(lambda _, completion: 1.0)
    result, work = run_lease(config, lambda *_: [1, 1, 1], verifier)
    assert (result, work.num_passed) == (None, 0)
    assert not verifier.calls


def test_truncated_completions_are_scored_with_score_truncated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(
        str(tmp_path), task={"score_truncated": True}, actors={"max_new_tokens": 3}
    )
    verifier = ScriptedVerifier(lambda _, completion: float(completion.endswith("1")))
    result, work = run_lease(
        config, ends_in_the_answer, verifier, kind=LeaseKind.EVALUATION, num_samples=4
    )
    assert result is None and work.num_passed == 4
    assert work.num_truncated_passed == 2


class OneInTwo:
    """Times out on the first and every second completion; the others pass, with a bonus."""

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        passed = Verdict(reward=1.5, passed=True, parts={"bonus": 0.5})
        late = unscored("timeout", "did not return")
        return [passed if number % 2 else late for number in range(len(completions))]


def lengthening(request: GenerationRequest, number: int) -> list[int]:
    return [7] * (1 + number)


def test_a_training_prompt_over_the_limit_is_left_out_but_still_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), task={"max_prompt_tokens": 3})
    verifier = ScriptedVerifier(lambda prompt, text: 1.0)
    longest, longer = (Prompt(prompt_id=0, text=text, answer="") for text in ("abc", "abcd"))
    run_lease(config, lengthening, verifier, prompt=longest)
    with pytest.raises(ModelError, match=r"4 tokens, more than task\.max_prompt_tokens = 3"):
        run_lease(config, lengthening, verifier, prompt=longer)
    evaluation, few = LeaseKind.EVALUATION, 2
    _, work = run_lease(
        config, lengthening, verifier, prompt=longer, kind=evaluation, num_samples=few
    )
    assert len(work.completions) == few


def test_a_training_group_with_an_unscored_completion_fails_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))
    with pytest.raises(UnscoredCompletions, match=r"^verifier timeout: 1 of 2 completions"):
        run_lease(config, lengthening, OneInTwo())


def test_an_evaluation_counts_unscored_completions_apart_and_reports_lengths(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))
    result, work = run_lease(
        config, lengthening, OneInTwo(), kind=LeaseKind.EVALUATION, num_samples=4
    )
    message = result_message(work, result, ActorCounts())
    assert isinstance(message, m.Evaluated)
    assert (message.num_completions, message.num_passed, message.num_unscored) == (4, 2, 2)
    report = RewardReport()
    report.add(work)
    lengths = OutcomeLengths(report.gauges())
    assert lengths.num_completions("timeout") == lengths.num_completions("scored") == 2
    assert (lengths.mean_tokens("timeout"), lengths.mean_tokens("scored")) == (2.0, 3.0)
    assert not any(name.startswith("reward/") for name in report.gauges())


def test_parts_of_training_rewards_are_reported_by_their_mean(tmp_path: Path) -> None:
    class Bonus:
        async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
            return [
                Verdict(reward=1.0, passed=number == 0, parts={"bonus": float(number)})
                for number in range(len(completions))
            ]

    (tmp_path / "config.json").write_text("{}")
    group, work = run_lease(make_config(str(tmp_path)), lengthening, Bonus())
    assert isinstance(group, Group) and group.num_passed == 2
    report = RewardReport()
    report.add(work)
    assert report.gauges()["reward/bonus"] == 0.5


def test_a_truncated_completion_earns_the_reward_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(
        str(tmp_path), task={"truncated_reward": -0.5}, actors={"max_new_tokens": 3}
    )
    verifier = ScriptedVerifier(lambda _, completion: 1.0)
    group, _ = run_lease(config, ends_in_the_answer, verifier)
    assert isinstance(group, Group)
    assert {(each.is_truncated, each.reward, each.passed) for each in group.completions} == {
        (True, -0.5, False),
        (False, 1.0, True),
    }


def test_a_suite_has_its_own_sampling_and_scorer_and_scores_truncated_text(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    suite = make_suite(tmp_path, "nucleus", samples=2, temperature=0.6, top_p=0.95)
    config = make_config(
        str(tmp_path),
        actors={"temperature": 0.7, "max_new_tokens": 4},
        evaluate={"suites": [suite]},
    )
    requests: list[GenerationRequest] = []

    def record(request: GenerationRequest, number: int) -> list[int]:
        requests.append(request)
        return [1] * (4 + number % 2)  # every second one exceeds the limit

    def evaluate(name: str, samples: int) -> LeaseProgress:
        _, work = run_lease(
            config,
            record,
            ScriptedVerifier(lambda _, completion: 0.0),
            kind=LeaseKind.EVALUATION,
            num_samples=samples,
            suite=name,
            suite_scorers={"nucleus": ScriptedVerifier(lambda _, completion: 1.0)},
        )
        return work

    assert (evaluate("nucleus", 2).num_passed, evaluate("held_out", 2).num_passed) == (2, 0)
    sampling = [(each.temperature, each.top_p) for each in requests]
    assert sampling == [(0.6, 0.95)] * 2 + [(0.7, 1.0)] * 2
