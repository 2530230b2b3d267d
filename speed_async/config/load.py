"""Load a TOML file and dotted overrides into a validated, frozen Config."""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from speed_async.config.checks.combinations import check_combinations
from speed_async.config.cuda import default_engine
from speed_async.config.hub_id import local_or_hub
from speed_async.config.names import did_you_mean
from speed_async.config.overrides import ROOT_FIELDS, parse_overrides
from speed_async.config.presets import with_preset
from speed_async.config.schema import Config
from speed_async.config.schema_errors import meant_fields, schema_error
from speed_async.config.unused import check_unused
from speed_async.config.whole_file import write_atomically
from speed_async.errors import CONFIG_FILE, ConfigError, ConfigErrors

PATH_FIELDS = (("model", "path"), ("task", "path"), ("cluster", "keys"))
REQUIRED = (("model", "path"), ("task", "name"))
"""Fields without a default, besides those of lists."""
SOURCE_LISTS = (("task", "sources"), ("evaluate", "suites"))
HUB_FIELDS = frozenset({"model.path", "task.path"})
"""Paths that may be ids of the Hugging Face hub."""
RESOLVED_FILE = "config.json"
"""Written to every run folder (config/resumed.py)."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply overrides such as `--learner.lr 1e-4`, and validate the result.

    `base = "other.toml"` in the file starts from the values of that file. Tables are merged; any
    other value, also a list, replaces that of the base.

    Relative paths in the file (model, data, keys) are relative to the folder of the file; relative
    paths in overrides to the current directory. Raises ConfigError with all errors.
    """
    config, errors = examine_config(path, overrides)
    return _raise_errors(config, errors)


def examine_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config | None, list[ConfigError]]:
    """Load a configuration and return all of its errors.

    With errors, the config omits the invalid values; it is None if a required field is missing.
    Raises ConfigError if the file cannot be read.
    """
    tree = _read_with_base(Path(path))
    changes, wrong_overrides = parse_overrides(overrides)
    _apply(tree, changes)
    config, errors = _examine(tree, [check_combinations, check_unused])
    return config, wrong_overrides + errors


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply dotted overrides to `tree` in place and return it. Raises ConfigError."""
    changes, errors = parse_overrides(overrides)
    if errors:
        raise ConfigErrors.of(errors)
    _apply(tree, changes)
    return tree


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises ConfigError with all errors.

    Settings without effect are accepted: an earlier version may have written them.
    """
    return _raise_errors(*_examine(tree, [check_combinations]))


def parse_config(tree: dict[str, Any]) -> Config:
    """Parse a nested dict, validating each field on its own. Raises ConfigError.

    For a configuration that was validated before: its paths may no longer exist.
    """
    try:
        return Config.model_validate(with_preset(tree, Config.model_fields["algorithm"].default))
    except ValidationError as error:
        raise ConfigErrors.of([schema_error(each) for each in error.errors()]) from None


def save_config(config: Config, path: Path) -> None:
    """Write `config` atomically. Raises OSError."""
    write_atomically(path, json.dumps(config.model_dump(), indent=2) + "\n")


def read_resolved(path: Path) -> Config:
    """Read a file written by `save_config`."""
    return build_config(json.loads(path.read_text()))


def _raise_errors(config: Config | None, errors: Sequence[ConfigError]) -> Config:
    if errors or config is None:
        raise ConfigErrors.of(errors)
    return config


def _examine(
    tree: dict[str, Any], checks: Sequence[Callable[[Config], Iterable[ConfigError]]]
) -> tuple[Config | None, list[ConfigError]]:
    """Validate `tree` and return the config with all errors.

    Invalid values are removed and the rest is validated again, so that one misspelt key hides no
    other errors. A combination is not reported if its error names a field whose value is invalid.
    """
    tree = with_preset(tree, Config.model_fields["algorithm"].default)
    actors = tree.get("actors", {})
    if isinstance(actors, dict) and "engine" not in actors:
        tree["actors"] = {"engine": default_engine(actors.get("device")), **actors}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
    else:
        return config, [error for check in checks for error in check(config)]
    errors = [schema_error(each) for each in details]
    invalid = [_named_part(each["loc"]) for each in details]
    kept = _without(tree, invalid)
    missing = [(name, field) for name, field in REQUIRED if field not in kept.get(name, {})]
    for section, field in missing:
        kept.setdefault(section, {})[field] = ""
    config = Config.model_validate(kept)
    names = [".".join(part) for part in (*invalid, *missing)]
    unknown = [each["loc"] for each in details if each["type"] == "extra_forbidden"]
    names += [meant for path in unknown for meant in meant_fields(path)]
    errors += [
        error for check in checks for error in check(config) if not _depends_on(names, error)
    ]
    return None if missing else config, errors


def _named_part(path: tuple[int | str, ...]) -> tuple[str, ...]:
    """`path` up to an element of a list."""
    length = next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))
    return tuple(map(str, path[:length]))


def _depends_on(invalid: Sequence[str], error: ConfigError) -> bool:
    """Whether an error is that of an invalid field, of a part or section of it, or names it."""
    return any(
        error.field.startswith(f"{field}.")
        or field.startswith(f"{error.field}.")
        or re.search(rf"(?<![\w.]){re.escape(field)}\b", str(error))
        for field in invalid
    )


def _without(tree: dict[str, Any], paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Copy `tree` without the values at `paths`."""
    copy = deepcopy(tree)
    for *sections, name in paths:
        inner: Any = copy
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(name, None)
    return copy


def _apply(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    _absolute_paths(changes, Path.cwd())
    for section, values in changes.items():
        if section in ROOT_FIELDS:
            tree[section] = values
            continue
        merged = tree.setdefault(section, {})
        if isinstance(merged, dict):  # else the schema rejects it
            _merge(merged, values)


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Merge `changes` into `tree` recursively."""
    for name, value in changes.items():
        present = tree.get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value)
        else:
            tree[name] = value


def _read_with_base(path: Path, based: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and its `base`, with absolute paths. `based`: the files that lead to this one."""
    tree = _read_file(path)
    folder = path.resolve().parent
    _absolute_paths(tree, folder)
    if "base" not in tree:
        return tree
    name = tree.pop("base")
    if not isinstance(name, str):
        raise ConfigError("base", name, f"in {path}: give the path of one TOML file, in quotes")
    base, based = (folder / Path(name).expanduser()).resolve(), (*based, path.resolve())
    if base in based:
        chain = " -> ".join(each.name for each in (*based, base))
        raise ConfigError("base", name, f"in {path}: a file cannot be its own base ({chain})")
    if not base.is_file():
        remedy = f"in {path}: no such file {base}; give the path of a TOML file"
        raise ConfigError("base", name, remedy)
    merged = _read_with_base(base, based)
    _merge(merged, tree)
    return merged


def _read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file, or the JSON file of a resolved configuration."""
    try:
        path.stat()
    except (OSError, ValueError) as error:  # for example a name that is too long or has a NUL byte
        if not isinstance(error, FileNotFoundError):
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(CONFIG_FILE, str(path), f"cannot be read: {reason}") from None
    if (path / RESOLVED_FILE).is_file() and (path / "logs").is_dir():
        remedy = f"this is a run folder; to resume the run: --resume {path}"
        raise ConfigError(CONFIG_FILE, str(path), remedy)
    if path.is_dir():
        found = sorted(each.name for each in path.glob("*.toml"))
        choices = [str(path / name) for name in found]
        raise ConfigError(
            CONFIG_FILE,
            str(path),
            f"a folder; {did_you_mean(choices)}give the path of a TOML file",
        )
    if not path.is_file():
        remedy = "no such file; give the path of a TOML file"
        if str(path).startswith("-"):
            remedy = "CONFIG comes first, then the overrides: my.toml --learner.lr 1e-4"
        raise ConfigError(CONFIG_FILE, str(path), remedy)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise ConfigError(CONFIG_FILE, str(path), f"not valid {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(CONFIG_FILE, str(path), "the file has no sections, such as [model]")
    return tree


def _absolute_paths(tree: dict[str, Any], base: Path) -> None:
    for section, field in PATH_FIELDS:
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(path := values.get(field), str):
            may_be_id = f"{section}.{field}" in HUB_FIELDS
            values[field] = (local_or_hub if may_be_id else _absolute)(path, base)
    for section, field in SOURCE_LISTS:
        values = tree.get(section)
        sources = values.get(field) if isinstance(values, dict) else None
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                source["path"] = local_or_hub(source["path"], base)


def _absolute(path: str, base: Path) -> str:
    return str((base / Path(path).expanduser()).resolve())
