"""Creates the task of the configuration section `[task]`. Heavy imports are lazy."""

from speed_async.config.checks.task import (
    GYM,
    SCRIPTED,
    VERIFIERS,
    is_own,
    library_of,
    unknown_task,
)
from speed_async.config.extensions import import_part
from speed_async.config.sections.task import TaskConfig
from speed_async.environments.task import Task
from speed_async.errors import ConfigError, HubDataError

_SCRIPTED = "speed_async.testing.scripted_task:make_scripted_task"


def make_task(config: TaskConfig) -> Task:
    """The task selected by `config.name`.

    Raises ConfigError (invalid value in the section), DataError (unusable data file) or TaskError
    (missing library).
    """
    library, data_set = library_of(config.name), config.name.partition(":")[2]
    if library == GYM:
        return _make_gym(config, data_set)
    if library == VERIFIERS:
        return _make_verifiers(config, data_set)
    if config.name == "arithmetic":
        return _make_arithmetic(config)
    if config.name == "dataset":
        return _make_dataset(config)
    if config.name == "jsonl":
        return _make_jsonl(config)
    path = _SCRIPTED if config.name == SCRIPTED else config.name
    if is_own(path):
        return import_part("task.name", path)(config)
    raise unknown_task(config.name)


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
