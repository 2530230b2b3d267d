"""From a TOML file and dotted overrides to one checked, frozen Config."""

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from speed_async.config.checks import check_combinations
from speed_async.config.names import all_sections, did_you_mean, similar_fields
from speed_async.config.overrides import ROOT_FIELDS, parse_overrides
from speed_async.config.presets import with_preset
from speed_async.config.schema import Config
from speed_async.config.whole_file import write_whole
from speed_async.errors import CONFIG_FILE, ConfigError, ConfigErrors

PATH_FIELDS = (("model", "path"), ("task", "path"), ("cluster", "keys"))
WANTED = {
    "int_": "give a whole number",
    "float_": "give a number",
    "bool_": "give true or false",
    "string_type": "give text in quotes",
    "finite_number": "give a finite number",
    "greater_than_equal": "give {} or more",
    "greater_than": "give more than {}",
    "less_than_equal": "give {} or less",
    "less_than": "give less than {}",
}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
RESOLVED_FILE = "config.json"
"""Lies in every run folder (config/resumed.py)."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply overrides such as `--learner.lr 1e-4`, check everything.

    Relative paths in the file (model, data, keys) are taken from the file's folder; relative paths
    in overrides from the current directory. Raises ConfigError with all that is wrong.
    """
    config, errors = examine_config(path, overrides)
    return _unless(config, errors)


def examine_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config | None, list[ConfigError]]:
    """What `load_config` reads, and all that is wrong with it.

    With errors, the config is what is left without the values that are no values of their fields;
    None where nothing is left to look at. Raises ConfigError when there is no such file.
    """
    tree = _read_file(Path(path))
    _absolute_paths(tree, Path(path).resolve().parent)
    changes, wrong_overrides = parse_overrides(overrides)
    try:
        _apply(tree, changes)
    except ConfigError as error:
        return None, [*wrong_overrides, error]
    config, errors = _examine(tree)
    return config, wrong_overrides + errors


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` (which is changed) under dotted overrides. Raises ConfigError."""
    changes, errors = parse_overrides(overrides)
    if errors:
        raise ConfigErrors.of(errors)
    _apply(tree, changes)
    return tree


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises ConfigError with all that is wrong."""
    return _unless(*_examine(tree))


def parse_config(tree: dict[str, Any]) -> Config:
    """A nested dict as a Config, each field valid by itself. Raises ConfigError.

    For a configuration that was checked before: what its paths lead to may be gone since.
    """
    try:
        return Config.model_validate(with_preset(tree, Config.model_fields["algorithm"].default))
    except ValidationError as error:
        raise ConfigErrors.of([_config_error(each) for each in error.errors()]) from None


def save_config(config: Config, path: Path) -> None:
    """Write `config`, whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(config.model_dump(), indent=2) + "\n")


def read_resolved(path: Path) -> Config:
    """Read what `save_config` wrote."""
    return build_config(json.loads(path.read_text()))


def _unless(config: Config | None, errors: Sequence[ConfigError]) -> Config:
    if errors or config is None:
        raise ConfigErrors.of(errors)
    return config


def _examine(tree: dict[str, Any]) -> tuple[Config | None, list[ConfigError]]:
    """The config, and all that is wrong with it.

    A value that its field refuses is left out and the rest looked at again, so that one misspelt
    key hides nothing else. A combination with fields of its section is not judged then.
    """
    tree = with_preset(tree, Config.model_fields["algorithm"].default)
    errors: list[ConfigError] = []
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
        errors = [_config_error(each) for each in details]
        try:
            config = Config.model_validate(_without(tree, [each["loc"] for each in details]))
        except ValidationError:  # a field that has no default
            return None, errors
    doubtful = {error.field.partition(".")[0] for error in errors}
    errors += [
        error
        for error in check_combinations(config)
        if error.field.partition(".")[0] not in doubtful
    ]
    return config, errors


def _without(tree: dict[str, Any], places: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of the tree without what lies at these places."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for place in places:
        inner: Any = copy
        for part in place[:-1]:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(place[-1], None)
    return copy


def _apply(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    _absolute_paths(changes, Path.cwd())
    for section, values in changes.items():
        if section in ROOT_FIELDS:
            tree[section] = values
            continue
        merged = tree.setdefault(section, {})
        if not isinstance(merged, dict):
            raise ConfigError(section, merged, "a section holds fields, such as --learner.lr 1e-4")
        _merge(merged, values)


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put changes into the tree, sections within sections too."""
    for name, value in changes.items():
        present = tree.get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value)
        else:
            tree[name] = value


def _read_file(path: Path) -> dict[str, Any]:
    """A TOML file, or the JSON of a resolved configuration."""
    try:
        path.stat()
    except (OSError, ValueError) as error:  # a name too long, a NUL byte
        if not isinstance(error, FileNotFoundError):
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(CONFIG_FILE, str(path), f"cannot be read: {reason}") from None
    if (path / RESOLVED_FILE).is_file() and (path / "logs").is_dir():
        remedy = f"this is the folder of a run; to go on with it: --resume {path}"
        raise ConfigError(CONFIG_FILE, str(path), remedy)
    if path.is_dir():
        found = sorted(each.name for each in path.glob("*.toml"))
        choices = [str(path / name) for name in found]
        raise ConfigError(
            CONFIG_FILE, str(path), f"a folder; {did_you_mean(choices)}give the path of a TOML file"
        )
    if not path.is_file():
        remedy = "no such file; give the path of a TOML file"
        if str(path).startswith("-"):
            remedy = "CONFIG comes first, its overrides after it: my.toml --learner.lr 1e-4"
        raise ConfigError(CONFIG_FILE, str(path), remedy)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise ConfigError(CONFIG_FILE, str(path), f"not valid {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(CONFIG_FILE, str(path), "it holds no sections, such as [model]")
    return tree


def _absolute_paths(tree: dict[str, Any], base: Path) -> None:
    for section, field in PATH_FIELDS:
        values = tree.get(section)
        if isinstance(values, dict) and isinstance(values.get(field), str):
            values[field] = str((base / Path(values[field]).expanduser()).resolve())


def _config_error(error: ErrorDetails) -> ConfigError:
    """pydantic's finding in the words of this project."""
    field = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return ConfigError(field, value, _unknown_key(field))
    if error["type"] == "missing":
        remedy = "this field is required; set it in the file or as an override"
        return ConfigError(field, None, remedy)
    if error["type"] == "model_type":
        fields = ", ".join(all_sections()[field].model_fields)
        return ConfigError(field, value, f"a section; set its fields: {fields}")
    remedy = _wanted(error) or error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", error["msg"])
        close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
        hint = did_you_mean([f"'{each}'" for each in close]).strip()
        remedy = f"{remedy}; {hint}" if hint else remedy
    return ConfigError(field, value, remedy)


def _wanted(error: ErrorDetails) -> str:
    """What a field takes, by the type of pydantic's error; empty where its own words are best."""
    kind, value = error["type"], error["input"]
    for beginning, wanted in WANTED.items():
        if kind.startswith(beginning):
            limit = next(iter(error.get("ctx", {}).values()), None)
            limit = f"{limit:g}" if isinstance(limit, float) else limit
            is_quoted = isinstance(value, str) and NUMBER.fullmatch(value.strip())
            return wanted.format(limit) + (", without quotes" if is_quoted else "")
    return ""


def _unknown_key(field: str) -> str:
    section, _, name = field.rpartition(".")
    model: type[BaseModel] = all_sections()[section] if section else Config
    known = sorted(model.model_fields)
    close = difflib.get_close_matches(name, known, n=1)
    choices = [f"'{each}'" for each in close or similar_fields(field)]
    return f"unknown key; {did_you_mean(choices)}known keys here: {', '.join(known)}"
