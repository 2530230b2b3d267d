"""Progress bars on the terminal; nothing when the output goes elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """The items, with a bar on standard error when that is a terminal."""
    from rich.console import Console
    from rich.progress import track as with_bar

    console = Console(stderr=True)
    if not console.is_terminal:
        return iter(items)
    return iter(with_bar(items, description, total=total, console=console, transient=True))
