"""The live console of one run, for people at a terminal."""

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
"""Status events that follow each other faster than this are drawn together."""
KEYS = "h help  s samples  q leave"


class Panel:
    """Draws the run's state over itself; the last picture stays when the panel is left.

    There is no thread: it draws when it is given an event, and in `look`, which is to be called a
    few times a second. While its terminal is in another's hands (a background job) it draws
    nothing. Use it where `can_show(console)`.
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
        self._open = ExitStack()
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=self._picture,
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> "Panel":
        with ExitStack() as opening:
            opening.enter_context(self._keyboard)
            self._has_keys = self._keyboard.is_there
            opening.callback(self._live.stop)
            self._draw()
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draws the last state and gives the cursor back, whatever ended the run."""
        self._view, self._has_keys = "figures", False
        self._open.close()

    def remember(self, event: Event) -> None:
        """Of what happened before: it is not drawn by itself."""
        self._state.update(event)

    def update(self, event: Event) -> None:
        self._state.update(event)
        self._silent_s = 0.0
        wall_s = finite(event.values.get("wall_s"))
        may_wait = event.kind not in ("evaluation", "end")
        if may_wait and wall_s is not None and 0 <= wall_s - self._drawn_s < MIN_FRAME_S:
            return
        self._drawn_s = self._drawn_s if wall_s is None else wall_s
        self._draw()

    def look(self, silent_s: float) -> Literal["stay", "leave"]:
        """See which keys were pressed; no event has come for `silent_s`."""
        keys = self._keyboard.pressed()
        for key in keys:
            if key in "qQ":
                return "leave"
            self._turn_to(key)
        is_another = int(silent_s) != int(self._silent_s)
        self._silent_s = silent_s
        if keys or (is_another and (silent_s >= SILENT_S or not self._state.values)):
            self._draw()
        return "stay"

    def _turn_to(self, key: str) -> None:
        if key in "h?":
            self._page = self._page + 1 if self._view == "help" else 0
            is_last = self._page >= num_help_pages(self._console.width, self._console.height)
            self._view = "figures" if is_last else "help"
        elif key in "sS":
            self._view = "figures" if self._view == "samples" else "samples"
        else:
            self._view = "figures"

    def _picture(self) -> RenderableType:
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
        if self._keyboard.is_elsewhere:
            return
        with self._console:  # one write for the whole frame
            self._console.control(_synchronised(True))
            if self._console.size != self._size:
                # The terminal has wrapped the old picture anew: its height is unknown.
                self._size = self._console.size
                self._console.clear()
            self._live.start()
            self._live.refresh()
            self._console.control(_synchronised(False))


def can_show(console: Console) -> bool:
    """Whether the console can draw over itself and has the characters for it."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.options.ascii_only
        and console.width >= 60
    )


def _synchronised(begin: bool) -> Control:
    """DEC mode 2026: the terminal shows the frame when it is whole. Others ignore it."""
    control = Control()
    code = "\x1b[?2026h" if begin else "\x1b[?2026l"
    control.segment = Segment(code, None, [(ControlType.HOME,)])
    return control
