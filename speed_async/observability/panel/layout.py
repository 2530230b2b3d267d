"""Columns of the panel, and which of its lines a small terminal goes without."""

import textwrap
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.text import Text

WIDE = 76
"""From this inner width on, notes are spelled out."""
LABEL, FIGURE, UNIT, GAP = 10, 9, 8, 1
ALWAYS = 0
"""Rank of a line that every picture has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the picture. Where there is no room, the highest ranks are left out first."""

    text: Text
    rank: int = ALWAYS


def fitting(lines: list[Line], room: int | None) -> list[Line]:
    """The lines of the lowest ranks, in their order: at most `room`, but all that are ALWAYS."""
    while room is not None and len(lines) > room:
        highest = max(line.rank for line in lines)
        if highest == ALWAYS:
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
    """`text`, one line of it, in lines of at most `width` columns, which begin with `first` and
    `rest`. Characters of two columns count as such."""
    if cell_len(text) == len(text):
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest)
    parts = chop_cells(text, width - max(len(first), len(rest)))
    return [(rest if index else first) + part for index, part in enumerate(parts)]


def without_middle(lines: list[str], most: int) -> list[str]:
    """At most `most` lines: of more, the first and the last ones, open where some are missing."""
    most = max(1, most)
    if len(lines) <= most:
        return lines
    num_last = most // 2
    first = lines[: most - num_last]
    return [*first[:-1], f"{first[-1][:-2]} …", *lines[len(lines) - num_last :]]
