"""The reward of a completion: a weighted sum of named rewards, with an outcome for each completion.

A reward is `correct` (the task's own score), a format reward, or a function of the user. One of
them decides whether a completion passes: `correct` if it is there, else the first one. A completion
passes when this reward, before weighting, is at least PASS_REWARD; a function of the user may
decide it otherwise. The other rewards never change what passes.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard

import numpy as np

from speed_async.config.extensions import import_part
from speed_async.config.sections.task import RewardConfig
from speed_async.environments.format_rewards import FORMAT_REWARDS
from speed_async.environments.task import Task
from speed_async.errors import SpeedAsyncError
from speed_async.types import MAX_REWARD, PASS_REWARD, Prompt, Verdict, VerifierOutcome

CORRECT = (RewardConfig(name="correct"),)
"""The default: the task's own score is the reward."""
REWARD, PASSED = "reward", "passed"
"""Keys of a dict that a reward function returns; its other keys are parts to log."""
MAX_ERROR_CHARS = 1000
"""Maximum length of a third-party error text, which may quote a whole completion."""
MAX_EXTRACTED_CHARS = 1000
"""Maximum length of an extracted answer, which is used for display only."""
MAX_PARTS = 32
MAX_PART_CHARS = 64


def unscored(outcome: VerifierOutcome, error: str) -> Verdict:
    """The verdict on a completion without a reward."""
    return Verdict(reward=math.nan, passed=False, outcome=outcome, error=error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reward:
    label: str
    weight: float
    function: Callable[[Prompt, str], object]
    """Of a prompt and a completion; returns a number, a dict, or an awaitable of either."""
    low: float = -MAX_REWARD
    high: float = MAX_REWARD


@dataclass(frozen=True, kw_only=True, slots=True)
class _Value:
    """What one reward says about one completion."""

    reward: float
    passed: bool
    parts: dict[str, float] = field(default_factory=dict)


class _Unusable(Exception):
    """A result that is not a reward."""


class Rewards:
    """The rewards of a configuration, for the prompts of one task.

    Use one instance in one thread. Awaitables run in an event loop that lives as long as the
    instance, so an async function may keep a connection open between calls.
    """

    def __init__(self, task: Task, chosen: Sequence[RewardConfig] = CORRECT) -> None:
        """Raises ConfigError if a reward function cannot be imported."""
        self._task = task
        self._rewards = [_reward(task, each) for each in chosen]
        self._deciding = next((i for i, e in enumerate(chosen) if e.name == "correct"), 0)
        self._is_logged = [each.name for each in chosen] != ["correct"]
        self._runner: asyncio.Runner | None = None

    def verdicts(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        """One verdict for each completion, `scored` or `error`. Async rewards run concurrently, the
        others one at a time."""
        functions = [partial(reward.function, prompt) for reward in self._rewards]
        results = [_called(each, completion) for completion in completions for each in functions]
        results = self._awaited(results)
        width = len(self._rewards)
        return [
            self._verdict(completion, results[width * index : width * (index + 1)])
            for index, completion in enumerate(completions)
        ]

    def _awaited(self, results: list[object]) -> list[object]:
        """The results, with awaitables replaced by their results or exceptions."""
        pending = [each for each in results if inspect.isawaitable(each)]
        if not pending:
            return results
        if self._runner is None:
            self._runner = asyncio.Runner()
        done = iter(self._runner.run(_gather(pending)))
        return [next(done) if inspect.isawaitable(each) else each for each in results]

    def _verdict(self, completion: str, results: Sequence[object]) -> Verdict:
        try:
            values = [
                _value(reward, result)
                for reward, result in zip(self._rewards, results, strict=True)
            ]
            total = sum(r.weight * v.reward for r, v in zip(self._rewards, values, strict=True))
            if not abs(total) <= MAX_REWARD:
                raise _Unusable(f"returned rewards with a sum of {total:g}, which is too large")
            extracted = self._extracted(completion)
        except _Unusable as error:
            return unscored("error", str(error))
        return Verdict(
            reward=total,
            passed=values[self._deciding].passed,
            parts=self._parts(values) if self._is_logged else {},
            extracted=extracted,
        )

    def _parts(self, values: Sequence[_Value]) -> dict[str, float]:
        parts: dict[str, float] = {}
        for reward, value in zip(self._rewards, values, strict=True):
            parts[reward.label] = value.reward
            parts |= {f"{reward.label}/{name}": part for name, part in value.parts.items()}
        return parts

    def _extracted(self, completion: str) -> str | None:
        extracted = _called(self._task.extract, completion)
        if isinstance(extracted, BaseException):
            raise _Unusable(f"raised {error_text(extracted)}")
        if extracted is not None and not isinstance(extracted, str):
            raise _Unusable(f"extracted {_shown(extracted)}, which is neither a string nor None")
        return None if extracted is None else str(extracted[:MAX_EXTRACTED_CHARS])


def reward_functions(chosen: Sequence[RewardConfig]) -> list[Callable[..., object]]:
    """The functions of the user and the format rewards among these. Raises ConfigError."""
    return [_function(each) for each in chosen if each.name != "correct"]


def error_text(error: BaseException) -> str:
    if isinstance(error, SpeedAsyncError):
        return str(error)
    try:
        text = str(error)[:MAX_ERROR_CHARS]
    except Exception:  # a third-party __str__ may raise
        text = "(no error text)"
    return f"{type(error).__name__}: {text}"


def _reward(task: Task, chosen: RewardConfig) -> _Reward:
    if chosen.name == "correct":
        return _Reward(
            label=chosen.label, weight=chosen.weight, function=task.score, low=0.0, high=1.0
        )
    function = _function(chosen)

    def call(prompt: Prompt, completion: str) -> object:
        return function(
            prompt=prompt.text,
            completion=completion,
            answer=prompt.answer,
            metadata=prompt.metadata,
        )

    return _Reward(label=chosen.label, weight=chosen.weight, function=call)


def _function(chosen: RewardConfig) -> Callable[..., object]:
    return FORMAT_REWARDS.get(chosen.name) or import_part("task.reward", chosen.name)


def _called(function: Callable[[str], object], completion: str) -> object:
    """The result, or the exception that the function raised."""
    try:
        return function(completion)
    except BaseException as error:  # some libraries derive their timeouts from BaseException
        return error


async def _gather(pending: Sequence[Awaitable[object]]) -> list[object]:
    return await asyncio.gather(*pending, return_exceptions=True)


def _value(reward: _Reward, result: object) -> _Value:
    """Raises _Unusable."""
    if isinstance(result, BaseException):
        raise _Unusable(f"raised {error_text(result)}")
    if not isinstance(result, Mapping):
        number = _number(reward, result)
        return _Value(reward=number, passed=number >= PASS_REWARD)
    if REWARD not in result:
        raise _Unusable(f"returned a dict without the key '{REWARD}'")
    number = _number(reward, result[REWARD])
    passed = result.get(PASSED, number >= PASS_REWARD)
    if not isinstance(passed, bool | np.bool_):
        raise _Unusable(f"returned '{PASSED}' = {_shown(passed)}, which is neither True nor False")
    parts = {name: part for name, part in result.items() if name not in (REWARD, PASSED)}
    return _Value(reward=number, passed=bool(passed), parts=_checked_parts(parts))


def _number(reward: _Reward, value: object) -> float:
    if _is_number(value) and math.isfinite(value) and reward.low <= value <= reward.high:
        return float(value)
    bounds = f"[{reward.low:g}, {reward.high:g}]"
    raise _Unusable(f"returned {_shown(value)}, which is not a finite number in {bounds}")


def _checked_parts(parts: Mapping[object, object]) -> dict[str, float]:
    checked: dict[str, float] = {}
    for name, value in parts.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_PART_CHARS:
            raise _Unusable(f"returned the key {_shown(name)}, which is not a short name")
        if not _is_number(value) or not abs(value) <= MAX_REWARD:
            raise _Unusable(f"returned '{name}' = {_shown(value)}, which is not a finite number")
        checked[name] = float(value)
    if len(checked) > MAX_PARTS:
        raise _Unusable(f"returned {len(checked)} parts; at most {MAX_PARTS} are logged")
    return checked


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating)


def _shown(value: object) -> str:
    return repr(value)[:80] if _is_number(value) or isinstance(value, str) else f"a {_kind(value)}"


def _kind(value: object) -> str:
    return type(value).__name__
