"""Parts of an algorithm or a task that a user adds.

A configuration names such a part by import path (`my_package.my_module:my_function`), or by a name
registered in this process. A registered name is replaced by its import path when the configuration
is validated, so that every process of the run, and a later resume, can import it.
"""

import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from speed_async.errors import ConfigError

Kind = Literal["task", "reward", "advantage", "policy_loss"]
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
FORM = "<module>:<name>"

F = TypeVar("F", bound=Callable[..., Any])
_registered: dict[tuple[Kind, str], str] = {}


def register(kind: Kind, name: str) -> Callable[[F], F]:
    """Decorator that registers a function or class under `name`.

    Raises ValueError if it cannot be imported by other processes: it must be defined at the top
    level of a module other than the main script.
    """

    def add(part: F) -> F:
        path = f"{part.__module__}:{part.__qualname__}"
        if part.__module__ == "__main__" or not IMPORT_PATH.fullmatch(path):
            raise ValueError(
                f"{kind} '{name}' ({path}) cannot be imported by the processes of a run: define it "
                "at the top level of a module, and import that module here"
            )
        _registered[kind, name] = path
        return part

    return add


def registered_path(kind: Kind, name: str) -> str:
    """The import path registered for `name`; `name` itself if there is none."""
    return _registered.get((kind, name), name)


def part_name(kind: Kind, *built_in: str) -> AfterValidator:
    """Validator of a field that holds a built-in name, a registered name or an import path."""
    return AfterValidator(partial(_validate, kind, built_in))


def _validate(kind: Kind, built_in: tuple[str, ...], name: str) -> str:
    path = registered_path(kind, name)
    if path in built_in or IMPORT_PATH.fullmatch(path):
        return path
    known = ", ".join(f"'{each}'" for each in built_in if each != "overlong")  # see checks.py
    raise PydanticCustomError("literal_error", f"Input should be {known} or {FORM}")  # type: ignore[arg-type]


def import_part(field: str, path: str) -> Any:
    """Import what `path` names. Modules in the current directory are found too.

    Raises ConfigError that names `field`.
    """
    module, _, attribute = path.partition(":")
    current_directory = str(Path.cwd())
    if current_directory not in sys.path:
        sys.path.append(current_directory)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            field,
            path,
            f"cannot be imported ({error}): give {FORM}, with the module installed, on PYTHONPATH "
            "or in the current directory",
        ) from error
