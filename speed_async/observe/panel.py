"""The live console of one run, for people at a terminal."""

from contextlib import ExitStack
from types import TracebackType

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment

from speed_async.observe.keyboard import without_echo
from speed_async.observe.metrics import Event
from speed_async.observe.notation import finite
from speed_async.observe.panel_state import PanelState
from speed_async.observe.panel_view import render

MIN_FRAME_S = 0.1
"""Status events that follow each other faster than this are drawn together."""


class Panel:
    """Draws the run's state over itself; the last picture stays when the panel is left.

    There is no thread: it draws when it is given an event. Use it where `can_show(console)`.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._state = PanelState(title)
        self._size = console.size
        self._drawn_s = float("-inf")
        self._open = ExitStack()
        self._live = Live(
            console=console, auto_refresh=False, get_renderable=self._picture, transient=False
        )

    def __enter__(self) -> "Panel":
        with ExitStack() as opening:
            opening.enter_context(without_echo())
            opening.callback(self._live.stop)
            self._live.start(refresh=True)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draws the last state and gives the cursor back, whatever ended the run."""
        self._open.close()

    def update(self, event: Event) -> None:
        self._state.update(event)
        wall_s = finite(event.values.get("wall_s"))
        is_gauge = event.kind in ("status", "step")
        if is_gauge and wall_s is not None and 0 <= wall_s - self._drawn_s < MIN_FRAME_S:
            return
        self._drawn_s = self._drawn_s if wall_s is None else wall_s
        self._draw()

    def _picture(self) -> RenderableType:
        return render(self._state, self._console.width, self._console.height)

    def _draw(self) -> None:
        with self._console:  # one write for the whole frame
            self._console.control(_synchronised(True))
            if self._console.size != self._size:
                # The terminal has wrapped the old picture anew: its height is unknown.
                self._size = self._console.size
                self._console.clear()
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
