"""From `[task]` of the configuration to a task. Nothing heavy is imported before it is chosen."""

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from speed_async.config.schema import TaskConfig
from speed_async.environments.task import Task
from speed_async.errors import ConfigError

_GYM = "reasoning_gym"
_SCRIPTED = "speed_async.testing.scripted_task:make_task"


def known_tasks() -> tuple[str, ...]:
    """Names `task.name` may have; `<name>` stands for any reasoning-gym data set, and
    `<module>:<callable>` for a task of the user's own, made from the section `[task]`."""
    return ("arithmetic", "jsonl", f"{_GYM}:<name>", "<module>:<callable>", "scripted")


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
    path = _SCRIPTED if config.name == "scripted" else config.name
    if ":" in path and kind != _GYM:
        return _imported(path)(config)
    raise ConfigError("task.name", config.name, _remedy(config.name))


def _imported(path: str) -> Callable[[TaskConfig], Task]:
    """What `module:attribute` names. Modules in the current directory are found too. Raises
    ConfigError."""
    module, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "task.name",
            path,
            f"cannot be imported ({error}): give module:attribute, the module installed, on "
            "PYTHONPATH or in the current directory",
        ) from error


def _make_arithmetic(config: TaskConfig) -> Task:
    from speed_async.environments.arithmetic import ArithmeticTask

    return ArithmeticTask(
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        max_digits=config.max_digits,
        seed=config.seed,
    )


def _make_jsonl(config: TaskConfig) -> Task:
    from speed_async.environments.jsonl import JsonlTask

    if config.path is None:
        raise ConfigError("task.path", None, "the jsonl task needs the path of its data file")
    return JsonlTask(
        path=config.path,
        match=config.match,
        num_held_out=config.num_held_out,
        seed=config.seed,
    )


def _make_gym(config: TaskConfig, data_set: str) -> Task:
    from speed_async.environments.gym import ReasoningGymTask

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
