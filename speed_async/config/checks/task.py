"""Checks of the section `[task]`: its name, its data and its rewards."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from speed_async.config.hub_id import is_hub_id
from speed_async.config.schema import Config
from speed_async.config.sections.sources import PROMPT_FORMAT, names_in
from speed_async.config.sections.task import TaskConfig
from speed_async.errors import ConfigError, NotAvailableHere

GYM, VERIFIERS = "reasoning_gym", "verifiers"
LIBRARIES = (GYM, VERIFIERS)
"""Tasks `<library>:<data set>`."""
BUILT_IN = ("arithmetic", "dataset", "jsonl")
SCRIPTED = "scripted"


def known_tasks() -> tuple[str, ...]:
    """Valid values of `task.name`. `<name>` is any data set of reasoning-gym, or environment of
    verifiers; `<module>:<callable>` is a user-defined factory that receives the section `[task]`.
    """
    libraries = (f"{each}:<name>" for each in LIBRARIES)
    return (*BUILT_IN, *libraries, "<module>:<callable>", SCRIPTED)


def library_of(name: str) -> str | None:
    """The library of a task `<library>:<data set>`; None for other tasks."""
    library, _, data_set = name.partition(":")
    return library if library in LIBRARIES and data_set else None


def is_own(name: str) -> bool:
    """Whether this is a task of the user, `<module>:<callable>`, or meant as one."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in LIBRARIES


def unknown_task(name: str) -> ConfigError:
    known = f"known tasks are {', '.join(known_tasks())}"
    library = name.partition(":")[0]
    if library in LIBRARIES:
        what = "a data set" if library == GYM else "an environment"
        example = "chain_sum" if library == GYM else "gsm8k"
        remedy = f"add {what} after the colon, such as {library}:{example}; {known}"
        return ConfigError("task.name", name, remedy)
    close = difflib.get_close_matches(name, known_tasks(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return ConfigError("task.name", name, f"unknown task{hint}; {known}")


def check_task(config: Config) -> Iterator[ConfigError]:
    task = config.task
    yield from _check_rewards(config)
    if task.name == "dataset":
        yield from _check_sources(config)
        return
    if not (task.name in (*BUILT_IN, SCRIPTED) or library_of(task.name) or is_own(task.name)):
        yield unknown_task(task.name)
    elif task.name == "jsonl" and task.path is None:
        yield ConfigError("task.path", None, "task.name = 'jsonl' needs a data file")
    elif (
        (task.name == "jsonl" or is_own(task.name))
        and task.path is not None
        and not Path(task.path).is_file()
    ):
        yield ConfigError("task.path", task.path, "no such file; set the path of a data file")


def _check_rewards(config: Config) -> Iterator[ConfigError]:
    task = config.task
    if task.rewards and task.reward != "correct":
        yield ConfigError(
            "task.reward",
            task.reward,
            "cannot be set together with task.rewards; add it to them as one more table with its "
            "name and weight",
        )
    labels = [each.label for each in task.weighted_rewards]
    for label in sorted({each for each in labels if labels.count(each) > 1}):
        yield ConfigError(
            "task.rewards",
            label,
            "several rewards have this name, which identifies them in metrics; use each once, or "
            "give functions different names",
        )
    if "overlong" in labels:
        yield ConfigError(
            "task.rewards",
            "overlong",
            "the length of a completion is known in tokens to the learner only, which applies this "
            "one; set objective.overlong_share (such as 0.1667) and objective.overlong_penalty, "
            "its weight",
        )


def check_format(field: str, text: str) -> Iterator[ConfigError]:
    if not names_in(text):
        yield ConfigError(
            field, text, f"every prompt would be this text; add {PROMPT_FORMAT} where it belongs"
        )


def _check_sources(config: Config) -> Iterator[ConfigError]:
    task = config.task
    if not task.all_sources:
        yield ConfigError(
            "task.path",
            None,
            "task.name = 'dataset' needs a data set: a folder written by `speed-async data "
            "prepare`, a file, or the id of a hub data set; several are set as task.sources",
        )
    if task.path is not None and task.sources:
        yield ConfigError(
            "task.path", task.path, "it is set beside task.sources; list it as one of the sources"
        )
    single = ("split", "subset", "columns", "format")
    for field in single if task.sources else ():
        if getattr(task, field) != TaskConfig.model_fields[field].get_default(
            call_default_factory=True
        ):
            yield ConfigError(
                f"task.{field}",
                getattr(task, field),
                "it belongs to task.path; with task.sources, set it in each source",
            )
    weighted = [source for source in task.sources if source.weight is not None]
    if 0 < len(weighted) < len(task.sources):
        without = next(source for source in task.sources if source.weight is None)
        yield ConfigError(
            "task.sources",
            without.path,
            "this source has no weight, and others have one; give all of them a weight, or none",
        )
    field = "task.sources" if task.sources else "task"
    for source in task.all_sources:
        yield from check_format(f"{field}.format", source.format)
        if not Path(source.path).exists() and not is_hub_id(source.path):
            field = "task.sources" if task.sources else "task.path"
            yield NotAvailableHere(
                field,
                source.path,
                "no such file or folder; set the path of a data set, or create it with "
                "`speed-async data prepare`",
            )
