"""Format a resolved configuration as TOML for `train`, with a description of each field."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from functools import cache
from typing import Any

from pydantic import BaseModel

from speed_async.config.schema import Config

WIDTH = 100
HEADER = """\
# Resolved configuration with presets, defaults and overrides. The values of the `algorithm` preset
# are written out, so changing `algorithm` here has no effect."""


def to_toml(config: Config) -> str:
    """Format all fields by section. A field that is None becomes a comment: TOML has no null."""
    return "\n".join([HEADER, "", *_section(config, "")]) + "\n"


def _section(section: BaseModel, path: str) -> Iterator[str]:
    """Yield the fields of a section, then its subsections: TOML requires this order."""
    if path:
        yield from ("", f"[{path}]")
    inner: list[tuple[str, BaseModel]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            inner.append((name, value))
            continue
        yield from _comment(field_descriptions(type(section)).get(name, ""))
        yield f"# {name} =" if value is None else f"{name} = {_value(value)}"
    for name, value in inner:
        yield from _section(value, f"{path}.{name}" if path else name)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="# ", subsequent_indent="# ")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes are valid in TOML, but TOML also requires an escape for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, Mapping):
        pairs = [
            f"{_value(str(key))} = {_value(each)}"
            for key, each in value.items()
            if each is not None
        ]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{value!r} cannot be represented in TOML")


@cache
def field_descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Docstrings of the fields, parsed from the source of the section and its base classes."""
    if section is BaseModel:
        return {}
    [found] = ast.parse(inspect.getsource(section)).body
    assert isinstance(found, ast.ClassDef)
    [base] = section.__bases__
    descriptions = dict(field_descriptions(base))
    for field, below in zip(found.body, found.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            descriptions[field.target.id] = str(below.value.value)
    return descriptions
