"""Parse dotted command-line overrides, such as `--learner.lr 1e-4`, into a nested dict."""

import tomllib
from collections.abc import Sequence
from typing import Any

from speed_async.config.names import (
    all_sections,
    did_you_mean,
    similar_fields,
    takes_text,
)
from speed_async.errors import ConfigError

ROOT_FIELDS = frozenset({"algorithm"})
"""Fields outside of sections."""
FORM = "an override has the form --section.field value"


def parse_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[ConfigError]]:
    """Parse `["--learner.lr", "1e-4", "--run.seed=3"]` into a nested dict, and collect errors."""
    changes: dict[str, Any] = {}
    errors: list[ConfigError] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, text = argument.partition("=")
        if not equals:
            text = remaining.pop(0) if remaining and _is_value(name, remaining[0]) else None
        try:
            _put(changes, argument, name, text)
        except ConfigError as error:
            errors.append(error)
    return changes, errors


def _is_value(name: str, following: str) -> bool:
    """Whether the argument after a name without `=` is its value: it must not start with `--`."""
    is_name = name.startswith("-") or bool(similar_fields(name))
    return is_name and not following.startswith("--")


def _put(changes: dict[str, Any], argument: str, name: str, text: str | None) -> None:
    field = name[2:]
    if not name.startswith("--") or ("." not in field and field not in ROOT_FIELDS):
        raise ConfigError(argument, text or "", _remedy(name, text))
    *sections, last = [part.replace("-", "_") for part in field.split(".")]
    path = ".".join((*sections, last))
    if text is None:
        raise ConfigError(field, "", f"this override has no value; {FORM}")
    target = changes
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(field, text, "an earlier override sets a value for its section")
    value = _parse_value(text)
    target[last] = text if takes_text(path) and not isinstance(value, str) else value


def _remedy(name: str, text: str | None) -> str:
    bare = name.lstrip("-").replace("-", "_")
    value = f" {text}" if text is not None else ""
    if (section := all_sections().get(bare)) is not None:
        fields = section.model_fields
        choices = [f"--{bare}.{name}{value}" for name in fields if fields[name].is_required()]
        return f"'{bare}' is a section; {did_you_mean(choices)}its fields are {', '.join(fields)}"
    choices = [f"--{field}{value}" for field in similar_fields(name)]
    if choices:
        return f"no such override; {did_you_mean(choices)}{FORM}"
    if name.startswith("-"):
        return f"no such override; {FORM} (`speed-async train --help` lists all fields)"
    return f"not an override: {FORM}, after one CONFIG"


def _parse_value(text: str) -> Any:
    """Parse a TOML value (numbers, true, lists, quoted strings); other text is returned as is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
