"""Creates the task of the configuration section `[task]`. Heavy imports are lazy."""

import difflib

from speed_async.config.extensions import import_part
from speed_async.config.sections.task import TaskConfig
from speed_async.environments.task import Task
from speed_async.errors import ConfigError, HubDataError

_GYM = "reasoning_gym"
_VERIFIERS = "verifiers"
_SCRIPTED = "speed_async.testing.scripted_task:make_scripted_task"


def known_tasks() -> tuple[str, ...]:
    """Valid values of `task.name`. `<name>` is any data set of reasoning-gym, or environment of
    verifiers; `<module>:<callable>` is a user-defined factory that receives the section `[task]`.
    """
    libraries = (f"{_GYM}:<name>", f"{_VERIFIERS}:<name>")
    return ("arithmetic", "dataset", "jsonl", *libraries, "<module>:<callable>", "scripted")


def make_task(config: TaskConfig) -> Task:
    """The task selected by `config.name`.

    Raises ConfigError (invalid value in the section), DataError (unusable data file) or TaskError
    (missing library).
    """
    kind, _, data_set = config.name.partition(":")
    if kind == _GYM and data_set:
        return _make_gym(config, data_set)
    if kind == _VERIFIERS and data_set:
        return _make_verifiers(config, data_set)
    if config.name == "arithmetic":
        return _make_arithmetic(config)
    if config.name == "dataset":
        return _make_dataset(config)
    if config.name == "jsonl":
        return _make_jsonl(config)
    path = _SCRIPTED if config.name == "scripted" else config.name
    if ":" in path and kind != _GYM:
        return import_part("task.name", path)(config)
    raise ConfigError("task.name", config.name, _remedy(config.name))


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


def _make_dataset(config: TaskConfig) -> Task:
    from speed_async.environments.dataset.task import DatasetTask

    if not config.all_sources:
        raise ConfigError("task.path", None, "the dataset task needs a data set")
    try:
        return DatasetTask(
            config.all_sources,
            match=config.match,
            num_held_out=config.num_held_out,
            seed=config.seed,
        )
    except HubDataError as error:
        raise error.in_field("task.sources" if config.sources else "task.path") from error


def _make_gym(config: TaskConfig, data_set: str) -> Task:
    from speed_async.environments.gym import ReasoningGymTask

    return ReasoningGymTask(
        data_set=data_set,
        options=config.options,
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        seed=config.seed,
    )


def _make_verifiers(config: TaskConfig, environment: str) -> Task:
    from speed_async.environments.verifiers_library.task import VerifiersTask

    return VerifiersTask(
        environment=environment,
        options=config.options,
        python=config.python,
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        seed=config.seed,
    )


def _remedy(name: str) -> str:
    known = f"known tasks are {', '.join(known_tasks())}"
    if name.partition(":")[0] == _GYM:
        return f"add a data set after the colon, such as {_GYM}:chain_sum; {known}"
    close = difflib.get_close_matches(name, known_tasks(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown task{hint}; {known}"
