"""Text graphics: sparklines and bars. All are readable without colour."""

from collections.abc import Iterable, Sequence

from rich.text import Text

LEVELS = "▁▂▃▄▅▆▇█"
SHARE_GLYPHS = "█▓▒░▚"
Point = tuple[float, float]
"""(seconds, value)"""


def sparkline(
    points: Sequence[Point], width: int, *, from_s: float, to_s: float, low: float, high: float
) -> str:
    """`width` columns over [from_s, to_s]; a column without points repeats the previous one.

    Columns before the first point are blank. `low` and `high` are the values of the lowest and
    highest levels.
    """
    columns = resample(points, width, from_s=from_s, to_s=to_s)
    return "".join(" " if value is None else _level(value, low, high) for value in columns)


def resample(
    points: Sequence[Point], width: int, *, from_s: float, to_s: float
) -> list[float | None]:
    """Mean of the points in each of `width` equal columns of [from_s, to_s]."""
    sums = [0.0] * width
    counts = [0] * width
    span_s = to_s - from_s
    before: float | None = None
    for at_s, value in points:
        if at_s < from_s:
            before = value
        elif width:
            share = (at_s - from_s) / span_s if span_s > 0 else 0.0
            column = min(width - 1, int(share * width))
            sums[column] += value
            counts[column] += 1
    columns: list[float | None] = []
    for total, num_points in zip(sums, counts, strict=True):
        before = total / num_points if num_points else before
        columns.append(before)
    return columns


def _level(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 0.0
    return LEVELS[min(len(LEVELS) - 1, max(0, int(share * len(LEVELS))))]


def bar(share: float | None, width: int, style: str) -> Text:
    """A horizontal bar filled to `share` in [0, 1]; None draws an empty bar."""
    filled = 0 if share is None else round(min(1.0, max(0.0, share)) * width)
    if share is not None and share > 0:
        filled = max(1, filled)
    return Text.assemble(("━" * filled, style), ("─" * (width - filled), "dim"))


def stacked_bar(shares: Iterable[float | None], styles: Sequence[str], width: int) -> Text:
    """Segments of SHARE_GLYPHS in the given order; `width` columns in total if the shares sum to 1.

    Boundaries are rounded instead of lengths, so the total never exceeds `width`.
    """
    parts = [max(0.0, share or 0.0) for share in shares]
    total = max(1.0, sum(parts))
    text = Text()
    drawn = 0
    running = 0.0
    for part, glyph, style in zip(parts, SHARE_GLYPHS, styles, strict=True):
        running += part
        end = round(running / total * width)
        text.append(glyph * (end - drawn), style)
        drawn = end
    return text.append("─" * (width - drawn), "dim")
