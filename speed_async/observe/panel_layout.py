"""Columns of the panel: label, figure, unit, graphic and note, aligned in every row."""

from dataclasses import dataclass

from rich.text import Text

WIDE = 76
"""From this inner width on, notes are spelled out."""
LABEL, FIGURE, UNIT, GAP = 10, 9, 8, 1


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
