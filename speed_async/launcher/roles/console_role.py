"""The console: displays a metrics feed as a panel on a terminal, or as lines elsewhere.

consumes   events of the feed, keys pressed
waits for  the first event (`patience_s`), then each following event (SILENCE_S)
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from speed_async.errors import DeadlineExceeded
from speed_async.launcher.ports import address_at, listens
from speed_async.launcher.standard_streams import discard_stdout
from speed_async.observability.lines import Lines
from speed_async.observability.metrics import Event
from speed_async.observability.panel.panel import Panel, can_show
from speed_async.transport.curve import ClientKeys, silence_hint
from speed_async.transport.feed import FeedSubscriber

SILENCE_S = 30.0
GONE_S = 10.0
"""A feed that is silent for this long is abandoned if its port does not accept connections."""
FIRST_EVENT_S = 5.0
"""Deadline for the first event of a run that is already in progress."""
POLL_S = 0.1
"""Interval of polling the keyboard and the clock."""
PROBE_S = 2.0
"""Interval of probing whether a silent feed still accepts connections."""
REMEMBERED_KINDS = ("step", "evaluation", "suite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The feed to display."""

    host: str
    port: int
    title: str
    keys: ClientKeys | None = None
    history: Sequence[Event] = ()
    """Earlier events."""

    @property
    def address(self) -> str:
        return address_at(self.host, self.port)


async def run_console(source: Source) -> None:
    """Run the console of `speed-async train` until the run ends; after a closed panel it prints
    lines.

    Raises DeadlineExceeded when the feed is silent.
    """
    try:
        await _accompany(source)
    except BrokenPipeError:  # such as `| head -1`
        discard_stdout()
        sys.stderr.write("the output has no reader any more; the run continues\n")


async def _accompany(source: Source) -> None:
    with_panel = can_show(Console())
    outcome = await _show(source, patience_s=SILENCE_S) if with_panel else "left"
    if outcome == "left":
        if with_panel:
            sys.stdout.write("the panel is closed; the run continues, and Ctrl-C stops it\n")
        # No history: earlier events have already been shown.
        await _show(source, patience_s=SILENCE_S, view=Lines(sys.stdout))


async def watch(source: Source) -> None:
    """Run a separate console until the run ends or the console is closed; the run is not affected.

    Raises DeadlineExceeded, within seconds if the address does not accept connections.
    """
    if not await listens(source.host, source.port, timeout_s=FIRST_EVENT_S):
        raise DeadlineExceeded(
            f"the metrics feed at {source.address}",
            "no process listens at this address. Is the run in progress? `speed-async console "
            "RUN_FOLDER` finds the address itself; logs/learner.log contains it as well (metrics "
            "feed at ...)",
            FIRST_EVENT_S,
        )
    view = None if can_show(Console()) else Lines(sys.stdout)
    if await _show(source, patience_s=FIRST_EVENT_S, view=view, history=source.history) == "left":
        sys.stdout.write("the console is closed; the run continues\n")


def show_past(title: str, history: Sequence[Event]) -> None:
    """Show the last state of a run that has ended."""
    terminal = Console()
    *before, last = history
    if can_show(terminal):
        with Panel(terminal, title) as panel:
            _remember(panel, before)
            panel.update(last)
    else:
        lines = Lines(sys.stdout)
        _remember(lines, before)
        lines.update(last)


async def _show(
    source: Source,
    *,
    patience_s: float,
    view: Lines | None = None,
    history: Sequence[Event] = (),
) -> Literal["ended", "left"]:
    """Display the feed in `view`, or in a panel."""
    subscriber = FeedSubscriber(source.host, source.port, keys=source.keys)
    this_task = asyncio.current_task()
    assert this_task is not None
    # On cancellation the panel draws its last frame and restores the terminal.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    try:
        if view is not None:
            _remember(view, history)
            return await _follow(subscriber, view, source, patience_s)
        with Panel(Console(), source.title) as panel:
            _remember(panel, source.history)
            return await _follow(subscriber, panel, source, patience_s)
    except asyncio.CancelledError:
        return "ended"
    finally:
        await subscriber.close()


def _remember(view: Panel | Lines, history: Sequence[Event]) -> None:
    for event in history:
        view.remember(event)


async def _follow(
    subscriber: FeedSubscriber, view: Panel | Lines, source: Source, patience_s: float
) -> Literal["ended", "left"]:
    clock = asyncio.get_running_loop().time
    known_s = max((_wall_s(event) for event in source.history), default=-1.0)
    received_s, has_event = clock(), False
    receiving: asyncio.Task[Event] | None = None
    try:
        while True:
            receiving = receiving or asyncio.create_task(subscriber.receive(SILENCE_S))
            await asyncio.wait((receiving,), timeout=POLL_S)
            if receiving.done():
                event, receiving = receiving.result(), None
                received_s, has_event = clock(), True
                if event.kind not in REMEMBERED_KINDS or _wall_s(event) > known_s:
                    view.update(event)
                if event.kind == "end":
                    return "ended"
            silent_s = clock() - received_s
            if view.poll(silent_s) == "leave":
                return "left"
            await _raise_if_gone(source, silent_s, patience_s, has_event=has_event)
    except DeadlineExceeded as error:
        raise _silent(source, error.waited_s, has_event=has_event) from None
    finally:
        if receiving is not None:
            receiving.cancel()


async def _raise_if_gone(
    source: Source, silent_s: float, patience_s: float, *, has_event: bool
) -> None:
    limit_s = GONE_S if has_event else patience_s
    if silent_s < limit_s or (has_event and silent_s % PROBE_S > POLL_S):
        return
    if not has_event or not await listens(source.host, source.port, timeout_s=PROBE_S):
        raise _silent(source, silent_s, has_event=has_event)


def _silent(source: Source, silent_s: float, *, has_event: bool) -> DeadlineExceeded:
    what = (
        "an event. The run has ended without an end event, or is unreachable"
        if has_event
        else f"an event (none has arrived; {silence_hint(source.keys)}). This may not be the port "
        "of the feed"
    )
    return DeadlineExceeded(f"the metrics feed at {source.address}", what, silent_s)


def _wall_s(event: Event) -> float:
    wall_s = event.values.get("wall_s")
    return float(wall_s) if isinstance(wall_s, (int, float)) else -1.0
