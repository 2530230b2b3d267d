"""Errors of the schema (pydantic) as errors of the configuration: field, value, remedy."""

import difflib
import re

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from speed_async.config.names import (
    REFUSED,
    all_sections,
    did_you_mean,
    how_to_set,
    similar_fields,
)
from speed_async.config.schema import Config
from speed_async.errors import ConfigError

EXPECTED = {
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


def schema_error(error: ErrorDetails) -> ConfigError:
    """Convert an error of pydantic to a ConfigError."""
    field = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return ConfigError(field, value, _unknown_key(field))
    if error["type"] == "missing":
        remedy = f"is required; {how_to_set(_without_indices(field))}"
        return ConfigError(field, None, remedy)
    if error["type"] == "model_type":
        fields = ", ".join(all_sections()[_without_indices(field)].model_fields)
        return ConfigError(field, value, f"is a section; set its fields: {fields}")
    remedy = _expected(error) or error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", error["msg"])
        close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
        hint = did_you_mean([f"'{each}'" for each in close]).strip()
        remedy = f"{remedy}; {hint}" if hint else remedy
    return ConfigError(field, value, remedy)


def meant_fields(path: tuple[int | str, ...]) -> list[str]:
    """The field that an unknown key is probably meant to set, if there is one."""
    *section, _ = map(str, path)
    return [".".join((*section, each)) for each in _close_keys(".".join(map(str, path)))]


def _expected(error: ErrorDetails) -> str:
    """Remedy for the error type of pydantic; empty to use the message of pydantic."""
    kind, value = error["type"], error["input"]
    for prefix, remedy in EXPECTED.items():
        if kind.startswith(prefix):
            limit = next(iter(error.get("ctx", {}).values()), None)
            limit = f"{limit:g}" if isinstance(limit, float) else limit
            is_quoted = isinstance(value, str) and NUMBER.fullmatch(value.strip())
            return remedy.format(limit) + (", without quotes" if is_quoted else "")
    return ""


def _unknown_key(field: str) -> str:
    if field in REFUSED:
        return REFUSED[field]
    known = _known_keys(field)
    close = _close_keys(field)
    choices = [f"'{each}'" for each in close or similar_fields(field)]
    return f"unknown key; {did_you_mean(choices)}known keys here: {', '.join(known)}"


def _known_keys(field: str) -> list[str]:
    """Keys of the section of `field`."""
    section = _without_indices(field).rpartition(".")[0]
    model: type[BaseModel] = all_sections()[section] if section else Config
    return sorted(model.model_fields)


def _close_keys(field: str) -> list[str]:
    """The key of the same section that an unknown `field` is most similar to, if there is one."""
    return difflib.get_close_matches(field.rpartition(".")[2], _known_keys(field), n=1)


def _without_indices(field: str) -> str:
    """`task.sources` for `task.sources.0`."""
    return ".".join(part for part in field.split(".") if not part.isdigit())
