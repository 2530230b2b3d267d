"""Layout of the panel: columns, and selection of lines for small terminals."""

import textwrap
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.text import Text

WIDE = 76
"""Inner width from which notes are shown in full."""
LABEL, FIGURE, UNIT, GAP = 10, 9, 8, 1
REQUIRED = 0
"""Rank of a line that is always shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the panel. Without enough space, the highest ranks are omitted first."""

    text: Text
    rank: int = REQUIRED


def fitting(lines: list[Line], max_lines: int | None) -> list[Line]:
    """Select at most `max_lines` lines of the lowest ranks, in order, and all REQUIRED ones."""
    while max_lines is not None and len(lines) > max_lines:
        highest = max(line.rank for line in lines)
        if highest == REQUIRED:
            break
        lines = [line for line in lines if line.rank < highest]
    return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Column widths, in characters."""

    inner: int
    graphic: int
    note: int

    @classmethod
    def of_width(cls, inner: int) -> "Layout":
        note = 22 if inner >= WIDE else 10
        graphic = inner - LABEL - FIGURE - GAP - UNIT - GAP - GAP - note
        return cls(inner=inner, graphic=max(0, graphic), note=note)

    @property
    def wide(self) -> bool:
        return self.inner >= WIDE

    def row(
        self,
        label: str,
        figure: str,
        *,
        unit: str = "",
        graphic: Text | None = None,
        note: str | Text = "",
        style: str = "bold",
    ) -> Text:
        line = Text(no_wrap=True)
        line.append(label.ljust(LABEL), "dim").append(figure.rjust(FIGURE), style)
        line.append(" " * GAP).append(unit.ljust(UNIT), "dim").append(" " * GAP)
        picture = graphic.copy() if graphic else Text()
        picture.truncate(self.graphic, overflow="ellipsis", pad=True)
        line.append_text(picture).append(" " * GAP)
        return line.append_text(note if isinstance(note, Text) else Text(note, "dim"))


def rule(name: str, scope: str, layout: Layout) -> Text:
    line = "─" * max(0, layout.inner - len(name) - len(scope) - 2)
    return Text.assemble((name, "bold"), (f" {line} {scope}", "dim"), no_wrap=True)


def text_row(label: str, text: Text) -> Text:
    return Text(label.ljust(LABEL), "dim", no_wrap=True).append_text(text)


def wrapped(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    """Wrap a single-line `text` to `width` columns, with the prefixes `first` and `rest`.

    Double-width characters count as two columns.
    """
    if cell_len(text) == len(text):
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest)
    parts = chop_cells(text, width - max(len(first), len(rest)))
    return [(rest if index else first) + part for index, part in enumerate(parts)]


def without_middle(lines: list[str], max_lines: int) -> list[str]:
    """Keep the first and last of at most `max_lines` lines, with an ellipsis for omitted ones."""
    max_lines = max(1, max_lines)
    if len(lines) <= max_lines:
        return lines
    num_last = max_lines // 2
    first = lines[: max_lines - num_last]
    return [*first[:-1], f"{first[-1][:-2]} …", *lines[len(lines) - num_last :]]
