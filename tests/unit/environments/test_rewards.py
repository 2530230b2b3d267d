"""Rewards by name, their weighted sum, what passes, and results that are not rewards."""

import asyncio
import math
from collections.abc import Callable

import pytest

from speed_async.config.sections.task import RewardConfig, TaskConfig
from speed_async.environments.format_rewards import answer_tag, boxed
from speed_async.environments.rewards import MAX_PARTS, Rewards
from speed_async.errors import ConfigError
from speed_async.types import Prompt
from tests.fakes.faulty_task import FaultyTask

PROMPT = Prompt(prompt_id=0, text="2 + 5", answer="7", metadata={"bonus": 0.25})
SEEN: list[tuple[str, str, str, dict[str, object]]] = []


def shown(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> object:
    SEEN.append((prompt, completion, answer, metadata))
    return {"reward": -0.5, "length": len(completion), "passed": completion == "x"}


async def slow(**_: object) -> float:
    global num_running, most_running
    num_running += 1
    most_running = max(most_running, num_running)
    await asyncio.sleep(0)
    num_running -= 1
    return 2.0


num_running = most_running = 0
LOOPS: set[int] = set()


async def loop_of(**_: object) -> float:
    LOOPS.add(id(asyncio.get_running_loop()))
    return 1.0


def none(**_: object) -> None:
    """No reward."""


def no_key(**_: object) -> object:
    return {"score": 1.0}


def odd_pass(**_: object) -> object:
    return {"reward": 1.0, "passed": 0.5}


def many_parts(**_: object) -> object:
    return {"reward": 1.0} | {str(number): 0.0 for number in range(MAX_PARTS + 1)}


def text_part(**_: object) -> object:
    return {"reward": 1.0, "why": "because"}


async def fails(**_: object) -> float:
    raise ValueError("no connection")


def infinite(**_: object) -> float:
    return math.inf


def chosen(function: Callable[..., object] | str, weight: float = 1.0) -> RewardConfig:
    name = function if isinstance(function, str) else f"{__name__}:{function.__name__}"
    return RewardConfig(name=name, weight=weight)


def test_the_default_is_the_score_of_the_task_without_parts() -> None:
    right, wrong = Rewards(FaultyTask()).verdicts(PROMPT, ["7", "8"])
    assert (right.reward, right.passed, right.parts, right.extracted) == (1.0, True, {}, "7")
    assert (wrong.reward, wrong.passed) == (0.0, False)


def test_a_function_gets_all_of_the_prompt_and_its_parts_are_named() -> None:
    SEEN.clear()
    first, second = Rewards(FaultyTask(), [chosen(shown)]).verdicts(PROMPT, ["x", "7"])
    assert SEEN[0] == ("2 + 5", "x", "7", {"bonus": 0.25})
    assert (first.reward, first.passed) == (-0.5, True)
    assert (second.reward, second.passed) == (-0.5, False)
    assert first.parts == {"shown": -0.5, "shown/length": 1.0}


@pytest.mark.parametrize("order", [1, -1])
def test_bonuses_change_the_reward_and_not_what_passes(order: int) -> None:
    rewards = [chosen("correct"), chosen("boxed", 0.5), chosen(slow, -0.25)][::order]
    right, boxed_wrong = Rewards(FaultyTask(), rewards).verdicts(PROMPT, ["7", r"\boxed{3}"])
    assert (right.reward, right.passed) == (0.5, True)
    assert (boxed_wrong.reward, boxed_wrong.passed) == (0.0, False)
    assert boxed_wrong.parts == {"correct": 0.0, "boxed": 1.0, "slow": 2.0}


def test_the_first_reward_decides_when_correctness_is_not_among_them() -> None:
    rewards = [chosen("boxed", 0.5), chosen(slow)]
    [verdict] = Rewards(FaultyTask(), rewards).verdicts(PROMPT, ["7"])
    assert (verdict.reward, verdict.passed) == (2.0, False)


def test_async_rewards_run_concurrently_in_one_event_loop() -> None:
    global most_running
    most_running = 0
    verdicts = Rewards(FaultyTask(), [chosen(slow)]).verdicts(PROMPT, ["a", "b", "c"])
    assert [verdict.reward for verdict in verdicts] == [2.0] * 3
    assert most_running == 3
    LOOPS.clear()
    rewards = Rewards(FaultyTask(), [chosen(loop_of)])
    for _ in range(3):
        rewards.verdicts(PROMPT, ["a"])
    assert len(LOOPS) == 1


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (none, "returned a NoneType, which is not a finite number"),
        (no_key, "returned a dict without the key 'reward'"),
        (odd_pass, "returned 'passed' = 0.5, which is neither True nor False"),
        (many_parts, "returned 33 parts; at most 32 are logged"),
        (text_part, "returned 'why' = 'because', which is not a finite number"),
        (fails, "raised ValueError: no connection"),
        (infinite, "returned inf, which is not a finite number"),
    ],
)
def test_what_is_not_a_reward_is_an_error_of_its_completion(
    function: Callable[..., object], error: str
) -> None:
    [verdict] = Rewards(FaultyTask(), [chosen(function)]).verdicts(PROMPT, ["7"])
    assert verdict.outcome == "error"
    assert verdict.error.startswith(error)
    assert math.isnan(verdict.reward)


def partial_credit(**_: object) -> float:
    return 0.9


def test_partial_credit_is_not_a_pass() -> None:
    [verdict] = Rewards(FaultyTask(), [chosen(partial_credit)]).verdicts(PROMPT, ["7"])
    assert (verdict.reward, verdict.passed) == (0.9, False)


def test_a_function_that_cannot_be_imported_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"task\.reward.*no_such_module"):
        Rewards(FaultyTask(), [chosen("no_such_module:x")])


def test_one_reward_is_a_list_of_one() -> None:
    assert TaskConfig(name="arithmetic", reward="boxed").weighted_rewards == (chosen("boxed"),)
    several = TaskConfig(name="arithmetic", rewards=[chosen("correct"), chosen("boxed", 0.1)])
    assert [each.weight for each in several.weighted_rewards] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("so it is \\boxed{7}.", 1.0),
        ("first\n$$\\boxed{\\frac{1}{2}}$$\n", 1.0),
        ("\\boxed{7} or \\boxed{8}", 0.0),
        ("\\boxed{7}\nand more", 0.0),
        ("\\boxed{7", 0.0),
        ("\\boxed{}", 0.0),
        ("\\boxed 7", 0.0),
        ("7", 0.0),
    ],
)
def test_boxed_rewards_one_complete_box_on_the_last_line(completion: str, reward: float) -> None:
    assert boxed(completion=completion, answer="7") == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("thinking <answer>7</answer>\n", 1.0),
        ("<answer>7</answer> more", 0.0),
        ("<answer>6</answer><answer>7</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("</answer><answer>", 0.0),
    ],
)
def test_answer_tag_rewards_one_answer_at_the_end(completion: str, reward: float) -> None:
    assert answer_tag(completion=completion) == reward
