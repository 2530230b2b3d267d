"""The configuration of a resumed run: the original one with permitted changes.

Fields that affect the replay of the journal or the sampling of recorded groups are fixed. Model and
data may have moved: fingerprints of their content verify that they are the same
(launcher/identity/identity.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_async.config.load import apply_overrides, build_config, parse_config
from speed_async.config.schema import Config
from speed_async.config.unused import check_unused
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
    "actors.max_new_tokens",
    "buffer",
    "learner.groups_per_update",
    "learner.lora_alpha",
    "learner.lora_rank",
    "evaluate",
)
"""Fixed fields, and sections whose fields are all fixed."""
CHANGEABLE = ("buffer.durability", "model.path", "task.path", "task.python")
"""Exceptions to FIXED."""
PATH_OPTIONS = {"model.path": "--model.path FOLDER", "task.path": "--task.path FILE"}
"""Options that set the new path of a moved model or data file."""


def load_resumed(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration of run folder `folder` with overrides such as `--run.updates 200`.

    Raises SpeedAsyncError if the folder has no resumable run, and ConfigError for a change of a
    fixed field.
    """
    folder = folder.expanduser().resolve()
    tree = _read(folder)
    original = parse_config(tree)
    config = _build(apply_overrides(tree, overrides))
    before = dict(_leaves(original.model_dump()))
    changed = [
        ConfigError(
            field,
            value,
            f"this run began with {before.get(field)!r}; its journal and groups depend on it. "
            "Keep that value, or start a new run",
        )
        for field, value in _leaves(config.model_dump())
        if before.get(field) != value and _is_fixed(field)
    ]
    unused = {error.field for error in check_unused(original)}  # accepted by an earlier version
    changed += [error for error in check_unused(config) if error.field not in unused]
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
    """Fields that a resumed run must keep, with their values; the run folder may move."""
    leaves = _leaves(config.model_dump(mode="json"))
    return {field: value for field, value in leaves if _is_fixed(field) and field != "run.folder"}


def _build(tree: dict[str, Any]) -> Config:
    try:
        return build_config(tree)
    except ConfigError as error:
        raise ConfigErrors.of([_with_path_option(each) for each in error.errors]) from None


def _with_path_option(error: ConfigError) -> ConfigError:
    option = PATH_OPTIONS.get(error.field)
    if option is None:
        return error
    remedy = f"{error.remedy}; if it was moved, set the new path: {option}"
    return ConfigError(error.field, error.value, remedy)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise SpeedAsyncError(
            f"--resume '{folder}': not a run folder (it has no {CONFIG_FILE}); give a run folder, "
            "such as runs/default"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpeedAsyncError(f"--resume '{folder}': {path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise SpeedAsyncError(f"--resume '{folder}': {path} is not a configuration")
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        field = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, field)
        else:
            yield field, value


def _is_fixed(field: str) -> bool:
    return field not in CHANGEABLE and any(
        field == fixed or field.startswith(f"{fixed}.") for fixed in FIXED
    )
