"""The panel's picture: a frame around its sections."""

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel as Frame
from rich.text import Text

from speed_async.observe.notation import single_line
from speed_async.observe.panel_layout import Layout, rule
from speed_async.observe.panel_rows import (
    MAX_WARNING_LINES,
    bottleneck_rows,
    flow_rows,
    learning_rows,
    progress_rows,
    rate_rows,
    warning_rows,
)
from speed_async.observe.panel_state import RECENT_S, PanelState

MAX_WIDTH = 120
FRAME_LINES = 3
"""Top, bottom, and the line that the cursor stands in."""


def render(state: PanelState, width: int, height: int | None = None) -> RenderableType:
    """The panel for a terminal of `width` x `height`: 22 lines, or 18 without the rules.

    A warning adds one to `MAX_WARNING_LINES` lines, as the height allows; the rules give way to
    it. No line is wider than `width`.
    """
    layout = Layout.of_width(min(width, MAX_WIDTH) - 4)
    sections = [
        (None, progress_rows(state, layout)),
        (rule("learning", "since the start", layout), learning_rows(state, layout)),
        (rule("throughput", f"last {RECENT_S:.0f} s", layout), rate_rows(state, layout)),
        (rule("flow", "groups", layout), flow_rows(state, layout)),
        (rule("learner's time", "last updates", layout), bottleneck_rows(state, layout)),
    ]
    num_rows = sum(len(rows) + (heading is not None) for heading, rows in sections)
    num_wanted = num_rows + len(warning_rows(state, layout, MAX_WARNING_LINES)) + FRAME_LINES
    ruled = height is None or height >= num_wanted
    lines: list[Text] = []
    for heading, rows in sections:
        lines += [heading] if ruled and heading else []
        lines += rows
    room = MAX_WARNING_LINES if height is None else height - len(lines) - FRAME_LINES
    lines += warning_rows(state, layout, max(1, min(room, MAX_WARNING_LINES)))
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
