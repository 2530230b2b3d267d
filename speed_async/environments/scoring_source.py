"""Finds the source files of a task's scoring code: its module and the local modules it imports."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

PACKAGE = "speed_async."
SCORING_PACKAGES = ("speed_async.environments.", "speed_async.testing.")
INSTALL_FOLDERS = frozenset({"site-packages", "dist-packages"})


@runtime_checkable
class NamesItsSources(Protocol):
    """A task that is scored by code in another process."""

    @property
    def source_files(self) -> Sequence[Path]: ...


def scoring_files(task: object, functions: Sequence[Callable[..., object]] = ()) -> list[Path]:
    """Source files of the task's classes and of these reward functions, and of the modules that
    they import, transitively; and those that the task names itself.

    Of this package, only modules in `environments` and `testing` are included; of user code, only
    modules in the task's folder or its subfolders. Installed packages are excluded.
    """
    found: set[Path] = set()
    names = [kind.__module__ for kind in type(task).__mro__]
    names += [origin.__name__ for each in functions if (origin := inspect.getmodule(each))]
    for name in names:
        module = sys.modules.get(name)
        if module is not None and module.__name__.partition(".")[0] not in sys.stdlib_module_names:
            path = _file_of(module)
            if path is not None:
                _collect(module, path.parent, found)
    if isinstance(task, NamesItsSources):
        found |= set(task.source_files)
    return sorted(found)


def _collect(module: ModuleType, folder: Path, found: set[Path]) -> None:
    path = _file_of(module)
    if path is None or path in found or not _is_relevant(module, path, folder):
        return
    found.add(path)
    for used in _referenced_modules(module):
        _collect(used, folder, found)


def _is_relevant(module: ModuleType, path: Path, folder: Path) -> bool:
    if module.__name__.startswith(PACKAGE):
        return module.__name__.startswith(SCORING_PACKAGES)
    return path.is_relative_to(folder) and not INSTALL_FOLDERS & set(path.relative_to(folder).parts)


def _referenced_modules(module: ModuleType) -> Iterator[ModuleType]:
    """Modules that this module references, or whose functions or classes it imports."""
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
