"""What math-verify is asked, what it is not asked, and how its failures are reported."""

import asyncio
from functools import partial

import pytest

from speed_async.config.sections.task import TaskConfig
from speed_async.environments.mathematics import fallback
from speed_async.environments.mathematics.fallback import is_askable
from speed_async.environments.mathematics.scoring import same_answer
from speed_async.environments.registry import make_task
from speed_async.environments.rewards import Rewards
from speed_async.environments.verifier import VerifierPool
from speed_async.types import Verdict


def test_functions_are_compared_by_math_verify() -> None:
    assert same_answer(r"\frac{\cos x}{\sin x}", r"\cot x")
    assert not same_answer(r"\tan x", r"\cot x")


def test_math_verify_is_not_asked_where_it_is_wrong() -> None:
    for candidate, answer in [
        (r"\text{sat}", r"\text{tas}"),
        (r"\sin x = 1", r"\cos x = 2"),
        (r"(\sin x, 2)", r"\{\sin x, 2\}"),
        (r"\sin x, 2, 3", r"\sin x, 2"),
        (r"50\% \sin x", r"50 \sin x"),
        (r"\sin(9^{9^{9}})", "1"),
        (r"\sin(99999999!)", "1"),
        (r"\sum_{k=1}^{9} k", "45"),
        ("5'", "5"),
        ("40_0", "40_9"),
        ("five million", "5"),
    ]:
        assert not is_askable(candidate, answer), candidate
        assert not same_answer(candidate, answer)


@pytest.fixture
def config(tmp_path) -> TaskConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": "\\\\cot x"}}\n' for i in range(3)))
    return TaskConfig(name="jsonl", path=str(path), match="math", num_held_out=1)


def test_the_task_scores_in_the_pool_like_in_this_process(config: TaskConfig) -> None:
    texts = [r"\boxed{\frac{1}{\tan x}}", r"\boxed{\tan x}", "", r"\boxed{\cot x}"]

    async def scored() -> list[Verdict]:
        async with VerifierPool(partial(make_task, config), 1, 60.0) as pool:
            return await pool.score(make_task(config).train_prompts[0], texts)

    verdicts = asyncio.run(scored())
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 1.0]
    assert [verdict.extracted for verdict in verdicts] == [
        r"\frac{1}{\tan x}",
        r"\tan x",
        None,
        r"\cot x",
    ]


def test_an_error_of_math_verify_is_not_a_zero(
    config: TaskConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Timeout(BaseException):
        """Like math-verify's own."""

    def fails(*_: object) -> object:
        raise Timeout("slow")

    monkeypatch.setattr(fallback, "_parsed", fails)
    task = make_task(config)
    [verdict] = Rewards(task).verdicts(task.train_prompts[0], [r"\boxed{\tan x}"])
    assert (verdict.outcome, verdict.error) == ("error", "raised Timeout: slow")


def test_a_completion_that_hangs_is_a_timeout(config: TaskConfig) -> None:
    nested = "\\sin(" * 12 + r"\sqrt[7]{x^5+\tan x}" + ")" * 12

    async def scored() -> list[Verdict]:
        async with VerifierPool(partial(make_task, config), 1, 0.01) as pool:
            return await pool.score(make_task(config).train_prompts[0], [rf"\boxed{{{nested}}}"])

    [verdict] = asyncio.run(scored())
    assert verdict.outcome == "timeout" and "did not return within" in verdict.error
