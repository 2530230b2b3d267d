"""Render the panel: a frame with figures, samples or help, fitted to the terminal."""

from typing import Literal

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel as Frame
from rich.text import Text

from speed_async.observability.notation import single_line
from speed_async.observability.panel.help import help_pages
from speed_async.observability.panel.histories import RECENT_S
from speed_async.observability.panel.layout import REQUIRED, Layout, Line, fitting, rule
from speed_async.observability.panel.learning import learning_rows
from speed_async.observability.panel.notices import event_lines, notice_lines
from speed_async.observability.panel.rows import (
    actor_rows,
    bottleneck_rows,
    flow_rows,
    progress_rows,
    rate_rows,
)
from speed_async.observability.panel.samples import sample_lines, samples_view
from speed_async.observability.panel.state import PanelState

View = Literal["figures", "samples", "help"]
FRAME_LINES = 3
"""Top and bottom borders, and the cursor line."""
RULES = 15
EVENTS = (11, *range(16, 27))
"""Ranks of the recent events, newest first."""
ACTORS = range(30, 38)
SAMPLE, SAMPLE_LINES = 40, 12
UNBOUNDED_EVENTS = 4
"""Recent events shown without a height limit."""


def render(
    state: PanelState,
    width: int,
    height: int | None = None,
    *,
    view: View = "figures",
    page: int = 0,
    keys: str = "",
    silent_s: float = 0.0,
) -> RenderableType:
    """Render the panel for a terminal of `width` x `height`.

    It never exceeds the width, nor the height from 15 lines on. `page` is the page of the help;
    `keys` is shown in the lower border.
    """
    layout = Layout.of_width(width - 4)
    max_lines = None if height is None else max(1, height - FRAME_LINES)
    if view == "help":
        pages = help_pages(layout, max_lines)
        texts = pages[page % len(pages)]
        keys = f"page {page % len(pages) + 1} of {len(pages)}  {keys}"
    elif view == "samples":
        texts = samples_view(state, layout, max_lines)
    else:
        texts = [line.text for line in _figures(state, layout, max_lines, silent_s)]
    for text in texts:
        text.truncate(layout.inner, overflow="ellipsis", pad=True)
    return Frame(
        Group(*texts),
        title=_border_text(Text("speed_async ", "bold").append(single_line(state.title)), layout),
        title_align="left",
        subtitle=_border_text(Text(keys), layout) if keys else None,
        subtitle_align="right",
        box=ROUNDED,
        border_style="dim",
        width=width,
    )


def num_help_pages(width: int, height: int) -> int:
    return len(help_pages(Layout.of_width(width - 4), max(1, height - FRAME_LINES)))


def _figures(
    state: PanelState, layout: Layout, max_lines: int | None, silent_s: float
) -> list[Line]:
    progress = progress_rows(state, layout, silent_s)
    num_kept = sum(line.rank == REQUIRED for line in progress)
    notices = notice_lines(state, layout, 1000 if max_lines is None else max_lines - num_kept)
    recent = rule("recent events", "newest first", layout)
    lines = [
        *progress,
        _ruled("learning", "since the start", layout),
        *learning_rows(state, layout),
        _ruled("throughput", f"last {RECENT_S:.0f} s", layout),
        *rate_rows(state, layout),
        _ruled("flow", "groups", layout),
        *flow_rows(state, layout),
        _ruled("learner time", "last updates", layout),
        *bottleneck_rows(state, layout),
        *_actors(state, layout),
        *_sample(state, layout),
        Line(text=recent, rank=EVENTS[1]),
        *event_lines(state, layout, EVENTS),
        *notices,
    ]
    if max_lines is None:
        lines = [line for line in lines if line.rank <= EVENTS[UNBOUNDED_EVENTS - 1]]
    return fitting(lines, max_lines)


def _actors(state: PanelState, layout: Layout) -> list[Line]:
    rows = actor_rows(state, layout, ACTORS)
    heading = rule("actors", "weight versions", layout)
    return [Line(text=heading, rank=rows[0].rank), *rows] if rows else []


def _sample(state: PanelState, layout: Layout) -> list[Line]:
    """The newest sample, if there is one."""
    if not state.samples:
        return []
    heading = rule("sample", "newest", layout)
    texts = [heading, *sample_lines(state.samples[-1], layout, SAMPLE_LINES)[:-1]]
    return [Line(text=text, rank=SAMPLE) for text in texts]


def _ruled(name: str, scope: str, layout: Layout) -> Line:
    return Line(text=rule(name, scope, layout), rank=RULES)


def _border_text(text: Text, layout: Layout) -> Text:
    text.no_wrap = True
    text.truncate(layout.inner - 4, overflow="ellipsis")
    return text
