"""From a TOML file and dotted overrides to one checked, frozen Config."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from speed_async.config.checks import check_combinations
from speed_async.config.presets import with_preset
from speed_async.config.schema import Config
from speed_async.config.whole_file import write_whole
from speed_async.errors import ConfigError

PATH_FIELDS = (("model", "path"), ("task", "path"), ("cluster", "keys"))
ROOT_FIELDS = frozenset({"algorithm"})
"""Fields that stand in no section."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply overrides such as `--learner.lr 1e-4`, check everything.

    Relative paths in the file (model, data, keys) are taken from the file's folder; relative paths
    in overrides from the current directory. Raises ConfigError.
    """
    tree = _read_toml(Path(path))
    _absolute_paths(tree, Path(path).resolve().parent)
    return build_config(apply_overrides(tree, overrides))


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` (which is changed) under dotted overrides. Raises ConfigError."""
    changes = parse_overrides(overrides)
    _absolute_paths(changes, Path.cwd())
    for section, values in changes.items():
        if section in ROOT_FIELDS:
            tree[section] = values
            continue
        merged = tree.setdefault(section, {})
        if not isinstance(merged, dict):
            raise ConfigError(section, merged, "a section holds fields, such as --learner.lr 1e-4")
        _merge(merged, values)
    return tree


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises ConfigError for the first thing that is wrong."""
    config = parse_config(tree)
    check_combinations(config)
    return config


def parse_config(tree: dict[str, Any]) -> Config:
    """A nested dict as a Config, each field valid by itself. Raises ConfigError.

    For a configuration that was checked before: what its paths lead to may be gone since.
    """
    try:
        return Config.model_validate(with_preset(tree, Config.model_fields["algorithm"].default))
    except ValidationError as error:
        raise _first_error(error) from None


def save_config(config: Config, path: Path) -> None:
    """Write `config`, whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(config.model_dump(), indent=2) + "\n")


def read_resolved(path: Path) -> Config:
    """Read what `save_config` wrote."""
    return build_config(json.loads(path.read_text()))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--learner.lr", "1e-4", "--run.seed=3"]` to a nested dict. Raises ConfigError."""
    changes: dict[str, Any] = {}
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, text = argument[2:].partition("=")
        if not argument.startswith("--") or ("." not in name and name not in ROOT_FIELDS):
            raise ConfigError(argument, "", "an override looks like --section.field value")
        if not equals:
            text = next(remaining, None)
            if text is None:
                raise ConfigError(name, "", "this override has no value")
        if name in ROOT_FIELDS:
            changes[name] = text
            continue
        *sections, field = name.split(".")
        place = changes
        for section in sections:
            place = place.setdefault(section.replace("-", "_"), {})
            if not isinstance(place, dict):
                raise ConfigError(name, text, "a part of it was given a value of its own before")
        place[field.replace("-", "_")] = _parse_value(text)
    return changes


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put changes into the tree, sections within sections too."""
    for name, value in changes.items():
        present = tree.get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value)
        else:
            tree[name] = value


def _parse_value(text: str) -> Any:
    """A TOML value where the text is one (numbers, true, lists, quoted strings), else the text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("CONFIG", str(path), "no such file; give the path of a TOML file")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", str(path), f"not valid TOML: {error}") from None


def _absolute_paths(tree: dict[str, Any], base: Path) -> None:
    for section, field in PATH_FIELDS:
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(field), str):
            values[field] = str((base / Path(values[field]).expanduser()).resolve())


def _first_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    value = first["input"]
    if first["type"] == "extra_forbidden":
        known = list(_fields_beside(first["loc"]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        remedy = f"unknown key; {hint}known keys here: {', '.join(sorted(known))}"
    elif first["type"] == "missing":
        value, remedy = None, "this field is required; set it in the file or as an override"
    else:
        remedy = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(field, value, remedy)


def _fields_beside(location: Sequence[int | str]) -> Iterable[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            return ()
        model = annotation
    return model.model_fields.keys()
