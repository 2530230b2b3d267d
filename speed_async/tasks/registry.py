"""From `[task]` of the configuration to a task. Nothing heavy is imported before it is chosen."""

import difflib

from speed_async.config.schema import TaskConfig
from speed_async.errors import ConfigError
from speed_async.tasks.task import Task

_GYM = "reasoning_gym"


def known_tasks() -> tuple[str, ...]:
    """Names `task.name` may have; `<name>` stands for any reasoning-gym data set."""
    return ("arithmetic", "jsonl", f"{_GYM}:<name>", "scripted")


def make_task(config: TaskConfig) -> Task:
    """The task that `config.name` chooses.

    Raises ConfigError (a value of the section is unusable), DataError (its file is), or
    TaskError (a library is missing).
    """
    kind, _, data_set = config.name.partition(":")
    if kind == _GYM and data_set:
        return _make_gym(config, data_set)
    if config.name == "arithmetic":
        return _make_arithmetic(config)
    if config.name == "jsonl":
        return _make_jsonl(config)
    if config.name == "scripted":
        return _make_scripted(config)
    raise ConfigError("task.name", config.name, _remedy(config.name))


def _make_arithmetic(config: TaskConfig) -> Task:
    from speed_async.tasks.arithmetic import ArithmeticTask

    return ArithmeticTask(
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        max_digits=config.max_digits,
        seed=config.seed,
    )


def _make_jsonl(config: TaskConfig) -> Task:
    from speed_async.tasks.jsonl import JsonlTask

    if config.path is None:
        raise ConfigError("task.path", None, "the jsonl task needs the path of its data file")
    return JsonlTask(
        path=config.path,
        match=config.match,
        num_held_out=config.num_held_out,
        seed=config.seed,
    )


def _make_scripted(config: TaskConfig) -> Task:
    from speed_async.tasks.scripted_task import ScriptedTask

    return ScriptedTask(num_prompts=config.num_prompts, num_held_out=config.num_held_out)


def _make_gym(config: TaskConfig, data_set: str) -> Task:
    from speed_async.tasks.gym import ReasoningGymTask

    return ReasoningGymTask(
        data_set=data_set,
        options=config.options,
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        seed=config.seed,
    )


def _remedy(name: str) -> str:
    known = f"known tasks are {', '.join(known_tasks())}"
    if name.partition(":")[0] == _GYM:
        return f"name a data set after the colon, such as {_GYM}:chain_sum; {known}"
    close = difflib.get_close_matches(name, known_tasks(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"no such task{hint}; {known}"
