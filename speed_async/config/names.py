"""Names of all configuration fields, and suggestions for misspelt names."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args, get_origin

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
    "group_size": "gate.n_init",
    "num_generations": "gate.n_init",
    "max_grad_norm": "learner.grad_clip",
    "save_steps": "learner.checkpoint_every",
    "eval_steps": "evaluate.every",
    "num_actors": "cluster.actors",
    "gpu_memory_utilization": "actors.vllm.gpu_memory_utilization",
    "data": "task.path",
    "dataset": "task.path",
}
"""Names of these fields in other libraries."""
REFUSED = {
    "actors.top_p": "training samples from the whole vocabulary: within a nucleus, the ratio of "
    "policy to behaviour policy carries the mass of the nucleus, so that clips act "
    "without staleness; leave it out, or lower actors.temperature (evaluate.suites have top_p)",
}
"""Fields of other libraries that this one does not have on purpose, and the remedy."""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of an annotation; None for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def element_section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of the elements of a list, such as `task.sources`; None otherwise."""
    arguments = get_args(annotation)
    return section_of(arguments[0]) if get_origin(annotation) is list else None


@cache
def all_fields() -> dict[str, Any]:
    """All value fields, such as `learner.lr`, with their annotations."""
    return dict(_fields(Config, ""))


@cache
def all_sections() -> dict[str, type[BaseModel]]:
    """All sections, such as `actors` and `actors.vllm`, and elements of lists of sections, such as
    `task.sources`."""
    return dict(_sections(Config, ""))


def fields_by_section() -> dict[str, list[str]]:
    """Field names by `--section.`; the key `--` has the fields outside of sections."""
    sections: dict[str, list[str]] = {}
    for field in all_fields():
        section, _, name = field.rpartition(".")
        sections.setdefault(f"--{section}." if section else "--", []).append(name)
    return sections


def takes_text(field: str) -> bool:
    """Whether the field is a string, so that an override is not parsed as another type."""
    annotation = all_fields().get(field)
    return annotation is str or str in get_args(annotation)


def similar_fields(name: str) -> list[str]:
    """Suggest full field names for an unknown `name`, the most similar first."""
    normalized = _normalize(name)
    by_name = {_normalize(field): field for field in all_fields()}
    if normalized in by_name:
        return [by_name[normalized]]
    last = re.split(r"[.]", name.strip("-"))[-1]
    for candidate in dict.fromkeys((normalized, _normalize(last))):
        if same := [field for field in all_fields() if field.rpartition(".")[2] == candidate]:
            return same[:MAX_SUGGESTIONS]
        if candidate in SYNONYMS:
            return [SYNONYMS[candidate]]
    close = difflib.get_close_matches(normalized, by_name, n=MAX_SUGGESTIONS, cutoff=0.75)
    if close:
        return [by_name[each] for each in close]
    last_parts = {field.rpartition(".")[2] for field in all_fields()}
    best = difflib.get_close_matches(_normalize(last), last_parts, n=1, cutoff=0.75)
    return [field for field in all_fields() if field.rpartition(".")[2] in best][:MAX_SUGGESTIONS]


def did_you_mean(choices: Sequence[str]) -> str:
    """Return `did you mean 'a' or 'b'? `; empty without choices."""
    if not choices:
        return ""
    return f"did you mean {' or '.join(choices)}? "


def _normalize(name: str) -> str:
    return re.sub(r"[-._\s]+", "_", name.strip("-")).lower()


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{prefix}{name}", info.annotation
        else:
            yield from _fields(section, f"{prefix}{name}.")


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in model.model_fields.items():
        section = section_of(info.annotation) or element_section_of(info.annotation)
        if section is not None:
            yield f"{prefix}{name}", section
            yield from _sections(section, f"{prefix}{name}.")


def how_to_set(field: str) -> str:
    """How to set a required field, or a section by its required fields."""
    section = all_sections().get(field)
    required = [] if section is None else section.model_fields.items()
    names = [f"{field}.{name}" for name, each in required if each.is_required()] or [field]
    return f"set {' and '.join(names)} in the file or as an override"
