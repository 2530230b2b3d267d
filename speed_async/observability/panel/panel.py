"""The live console of one run, on a terminal."""

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Literal

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment

from speed_async.observability.metrics import Event
from speed_async.observability.notation import finite
from speed_async.observability.panel.keyboard import Keyboard
from speed_async.observability.panel.rows import SILENT_S
from speed_async.observability.panel.state import PanelState
from speed_async.observability.panel.view import View, num_help_pages, render

MIN_FRAME_S = 0.1
"""Minimum time between frames; faster status events share a frame."""
KEYS = "h help  s samples  q close"


class Panel:
    """Draws the state of the run in place. The last frame remains when the panel is closed.

    There is no thread: the panel draws on events and in `poll`, to be called a few times per
    second. As a background job it draws nothing. Requires `can_show(console)`.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._state = PanelState(title)
        self._size = console.size
        self._drawn_s = float("-inf")
        self._silent_s = 0.0
        self._view: View = "figures"
        self._page = 0
        self._keyboard = Keyboard()
        self._has_keys = False
        self._stack = ExitStack()
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=self._render,
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> "Panel":
        with ExitStack() as stack:
            stack.enter_context(self._keyboard)
            self._has_keys = self._keyboard.is_available
            stack.callback(self._live.stop)
            self._draw()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draw the last state and restore the cursor."""
        self._view, self._has_keys = "figures", False
        self._stack.close()

    def remember(self, event: Event) -> None:
        """Process an event from before the start of the panel, without drawing."""
        self._state.update(event)

    def update(self, event: Event) -> None:
        self._state.update(event)
        self._silent_s = 0.0
        wall_s = finite(event.values.get("wall_s"))
        can_wait = event.kind not in ("evaluation", "suite", "end")
        if can_wait and wall_s is not None and 0 <= wall_s - self._drawn_s < MIN_FRAME_S:
            return
        self._drawn_s = self._drawn_s if wall_s is None else wall_s
        self._draw()

    def poll(self, silent_s: float) -> Literal["stay", "leave"]:
        """Handle pressed keys. `silent_s` is the time since the last event."""
        keys = self._keyboard.pressed()
        for key in keys:
            if key in "qQ":
                return "leave"
            self._handle_key(key)
        is_new_second = int(silent_s) != int(self._silent_s)
        self._silent_s = silent_s
        if keys or (is_new_second and (silent_s >= SILENT_S or not self._state.values)):
            self._draw()
        return "stay"

    def _handle_key(self, key: str) -> None:
        if key in "h?":
            self._page = self._page + 1 if self._view == "help" else 0
            is_last = self._page >= num_help_pages(self._console.width, self._console.height)
            self._view = "figures" if is_last else "help"
        elif key in "sS":
            self._view = "figures" if self._view == "samples" else "samples"
        else:
            self._view = "figures"

    def _render(self) -> RenderableType:
        return render(
            self._state,
            self._console.width,
            self._console.height,
            view=self._view,
            page=self._page,
            keys=KEYS if self._has_keys else "",
            silent_s=self._silent_s,
        )

    def _draw(self) -> None:
        if self._keyboard.is_background:
            return
        with self._console:  # one write for the whole frame
            self._console.control(_synchronised(True))
            if self._console.size != self._size:
                # The terminal has rewrapped the old frame, so its height is unknown.
                self._size = self._console.size
                self._console.clear()
            self._live.start()
            self._live.refresh()
            self._console.control(_synchronised(False))


def can_show(console: Console) -> bool:
    """Whether the console supports drawing in place and Unicode."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.options.ascii_only
        and console.width >= 60
    )


def _synchronised(begin: bool) -> Control:
    """DEC mode 2026: show only complete frames. Ignored by terminals without support."""
    control = Control()
    code = "\x1b[?2026h" if begin else "\x1b[?2026l"
    control.segment = Segment(code, None, [(ControlType.HOME,)])
    return control
