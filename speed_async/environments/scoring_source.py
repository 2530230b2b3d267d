"""The files of the code that scores: a task's own module, and what that takes from beside it."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

OWN = "speed_async."
OWN_SCORING = "speed_async.environments."
INSTALLED = frozenset({"site-packages", "dist-packages"})


def scoring_files(task: object) -> list[Path]:
    """Source files of the task's classes and of what these import, over any number of imports: of
    this package what lies in `tasks`, of a user's own code what lies in the same folder or below
    it. Installed packages are not followed."""
    found: set[Path] = set()
    for kind in type(task).__mro__:
        module = sys.modules.get(kind.__module__)
        if module is not None and module.__name__.partition(".")[0] not in sys.stdlib_module_names:
            path = _file_of(module)
            if path is not None:
                _collect(module, path.parent, found)
    return sorted(found)


def _collect(module: ModuleType, folder: Path, found: set[Path]) -> None:
    path = _file_of(module)
    if path is None or path in found or not _counts(module, path, folder):
        return
    found.add(path)
    for used in _used(module):
        _collect(used, folder, found)


def _counts(module: ModuleType, path: Path, folder: Path) -> bool:
    if module.__name__.startswith(OWN):
        return module.__name__.startswith(OWN_SCORING)
    return path.is_relative_to(folder) and not INSTALLED & set(path.relative_to(folder).parts)


def _used(module: ModuleType) -> Iterator[ModuleType]:
    """Modules that this one refers to, or that it took a function or a class from."""
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value
            continue
        origin = inspect.getmodule(value) if callable(value) else None
        if origin is not None:
            yield origin


def _file_of(module: ModuleType) -> Path | None:
    file = vars(module).get("__file__")
    return Path(file).resolve() if isinstance(file, str) and file.endswith(".py") else None
