"""The panel's picture: a frame around its sections."""

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel as Frame
from rich.text import Text

from speed_async.observe.notation import single_line
from speed_async.observe.panel_layout import Layout, rule
from speed_async.observe.panel_rows import (
    bottleneck_rows,
    flow_rows,
    learning_rows,
    progress_rows,
    rate_rows,
)
from speed_async.observe.panel_state import RECENT_S, PanelState

MAX_WIDTH = 120
FULL_HEIGHT = 23
"""Below it the section rules are left out."""


def render(state: PanelState, width: int, height: int | None = None) -> RenderableType:
    """The panel for a terminal of `width` x `height`: 21 lines, or 17 below `FULL_HEIGHT`.

    A warning adds one line. No line is wider than `width`.
    """
    layout = Layout.of_width(min(width, MAX_WIDTH) - 4)
    sections = [
        (None, progress_rows(state, layout)),
        (rule("learning", "since the start", layout), learning_rows(state, layout)),
        (rule("throughput", f"last {RECENT_S:.0f} s", layout), rate_rows(state, layout)),
        (rule("flow", "groups", layout), flow_rows(state, layout)),
        (rule("learner's time", "last updates", layout), bottleneck_rows(state, layout)),
    ]
    ruled = height is None or height >= FULL_HEIGHT
    lines: list[Text] = []
    for heading, rows in sections:
        lines += [heading] if ruled and heading else []
        lines += rows
    for line in lines:
        line.truncate(layout.inner, overflow="ellipsis", pad=True)
    return Frame(
        Group(*lines),
        title=_title(state, layout),
        title_align="left",
        box=ROUNDED,
        border_style="dim",
        width=min(width, MAX_WIDTH),
    )


def _title(state: PanelState, layout: Layout) -> Text:
    title = Text(no_wrap=True)
    title.append("speed_async ", "bold").append(single_line(state.title))
    title.truncate(layout.inner - 4, overflow="ellipsis")
    return title
