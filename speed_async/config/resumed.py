"""The configuration of a run that is resumed: its own, with the few changes that it can bear.

What is fixed is what the journal is replayed under (the service would decide otherwise the second
time) and what the recorded groups were sampled under. Model and data may lie in a new place: their
content tells whether they are the same (launcher/identity/identity.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_async.config.load import apply_overrides, build_config, parse_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, ConfigErrors, SpeedAsyncError

CONFIG_FILE = "config.json"
FIXED = (
    "algorithm",
    "run.folder",
    "run.seed",
    "run.overlap",
    "model",
    "task",
    "gate",
    "curriculum",
    "actors.temperature",
    "actors.top_p",
    "actors.max_new_tokens",
    "buffer",
    "learner.groups_per_update",
    "evaluate",
    "cluster.learners",
)
"""Fields, and sections with all their fields."""
CHANGEABLE = ("buffer.durability", "model.path", "task.path")
"""Exceptions from the above."""
PLACES = {"model.path": "--model.path FOLDER", "task.path": "--task.path FILE"}
"""How a run is told where something was moved to."""


def load_resumed(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in run folder `folder`, under overrides such as `--run.updates 200`.

    Raises SpeedAsyncError when no run that can be resumed is there, and ConfigError for a change
    that it cannot bear.
    """
    folder = folder.expanduser().resolve()
    tree = _read(folder)
    began = parse_config(tree)
    config = _build(apply_overrides(tree, overrides))
    before = dict(_leaves(began.model_dump()))
    changed = [
        ConfigError(
            field,
            value,
            f"this run began with {before.get(field)!r}, which its journal and its groups rest "
            "on; leave it as it is, or start a new run",
        )
        for field, value in _leaves(config.model_dump())
        if before.get(field) != value and _is_fixed(field)
    ]
    if changed:
        raise ConfigErrors.of(changed)
    if config.buffer.durability == "none":
        raise ConfigError(
            "buffer.durability",
            "none",
            f"a run without a journal cannot be resumed; start a new run from a checkpoint: "
            f"--model.path {folder / 'checkpoints'}/version-N",
        )
    # A run folder may have been moved.
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})


def fixed_settings(config: Config) -> dict[str, Any]:
    """Every field that a resumed run has to keep, and its value; the run folder may be moved."""
    leaves = _leaves(config.model_dump(mode="json"))
    return {field: value for field, value in leaves if _is_fixed(field) and field != "run.folder"}


def _build(tree: dict[str, Any]) -> Config:
    try:
        return build_config(tree)
    except ConfigError as error:
        raise ConfigErrors.of([_with_place(each) for each in error.errors]) from None


def _with_place(error: ConfigError) -> ConfigError:
    option = PLACES.get(error.field)
    if option is None:
        return error
    remedy = f"{error.remedy}; if it was moved, give its new place: {option}"
    return ConfigError(error.field, error.value, remedy)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise SpeedAsyncError(
            f"--resume '{folder}': no run is there (it has no {CONFIG_FILE}); give the folder of a "
            "run, such as runs/default"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpeedAsyncError(f"--resume '{folder}': {path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise SpeedAsyncError(f"--resume '{folder}': {path} holds no configuration")
    return tree


def _leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        field = f"{place}.{name}" if place else name
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, field)
        else:
            yield field, value


def _is_fixed(field: str) -> bool:
    return field not in CHANGEABLE and any(
        field == fixed or field.startswith(f"{fixed}.") for fixed in FIXED
    )
