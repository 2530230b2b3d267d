"""The names of all configuration fields, and which of them a misspelt name may mean."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from speed_async.config.schema import Config

MAX_SUGGESTIONS = 3
SYNONYMS = {
    "learning_rate": "learner.lr",
    "batch_size": "learner.groups_per_update",
    "steps": "run.updates",
    "num_steps": "run.updates",
    "max_steps": "run.updates",
    "total_steps": "run.updates",
    "output_dir": "run.folder",
    "run_dir": "run.folder",
    "dir": "run.folder",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "max_tokens": "actors.max_new_tokens",
    "max_completion_length": "actors.max_new_tokens",
    "max_model_len": "model.context_length",
    "group_size": "gate.n_cont",
    "num_generations": "gate.n_cont",
    "max_grad_norm": "learner.grad_clip",
    "save_steps": "learner.checkpoint_every",
    "eval_steps": "evaluate.every",
    "num_actors": "cluster.actors",
    "gpu_memory_utilization": "actors.vllm.gpu_memory_utilization",
    "data": "task.path",
    "dataset": "task.path",
}
"""Names that other libraries have for these fields."""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


@cache
def all_fields() -> dict[str, Any]:
    """Every field that holds a value, such as `learner.lr`, with its annotation."""
    return dict(_fields(Config, ""))


@cache
def all_sections() -> dict[str, type[BaseModel]]:
    """Every section, such as `actors` and `actors.vllm`."""
    return dict(_sections(Config, ""))


def fields_by_section() -> dict[str, list[str]]:
    """Names of fields under `--section.` of each section, and of those that stand in none."""
    sections: dict[str, list[str]] = {}
    for field in all_fields():
        section, _, name = field.rpartition(".")
        sections.setdefault(f"--{section}." if section else "--", []).append(name)
    return sections


def takes_text(field: str) -> bool:
    """Whether this field holds text, so that an override's value is never read as a number."""
    annotation = all_fields().get(field)
    return annotation is str or str in get_args(annotation)


def similar_fields(name: str) -> list[str]:
    """Full names of the fields that `name`, which is none, may mean; the likeliest first."""
    wanted = _plain(name)
    by_plain_name = {_plain(field): field for field in all_fields()}
    if wanted in by_plain_name:
        return [by_plain_name[wanted]]
    last = re.split(r"[.]", name.strip("-"))[-1]
    for candidate in dict.fromkeys((wanted, _plain(last))):
        if same := [field for field in all_fields() if field.rpartition(".")[2] == candidate]:
            return same[:MAX_SUGGESTIONS]
        if candidate in SYNONYMS:
            return [SYNONYMS[candidate]]
    close = difflib.get_close_matches(wanted, by_plain_name, n=MAX_SUGGESTIONS, cutoff=0.75)
    if close:
        return [by_plain_name[each] for each in close]
    last_parts = {field.rpartition(".")[2] for field in all_fields()}
    best = difflib.get_close_matches(_plain(last), last_parts, n=1, cutoff=0.75)
    return [field for field in all_fields() if field.rpartition(".")[2] in best][:MAX_SUGGESTIONS]


def did_you_mean(choices: Sequence[str]) -> str:
    """`did you mean 'a' or 'b'? `, and nothing where there is no choice."""
    if not choices:
        return ""
    return f"did you mean {' or '.join(choices)}? "


def _plain(name: str) -> str:
    return re.sub(r"[-._\s]+", "_", name.strip("-")).lower()


def _fields(model: type[BaseModel], place: str) -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{place}{name}", info.annotation
        else:
            yield from _fields(section, f"{place}{name}.")


def _sections(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is not None:
            yield f"{place}{name}", section
            yield from _sections(section, f"{place}{name}.")
