"""The console: follows a feed and shows it, as a panel on a terminal and as lines elsewhere.

consumes   events of the feed, keys that are pressed
waits for  the first event (`patience_s`), then for each next one (SILENCE_S)
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from speed_async.errors import DeadlineExceeded
from speed_async.launcher.ports import listens
from speed_async.launcher.standard_streams import forget_stdout
from speed_async.observability.lines import Lines
from speed_async.observability.metrics import Event
from speed_async.observability.panel.panel import Panel, can_show
from speed_async.transport.curve import ClientKeys, why_silent
from speed_async.transport.feed import FeedSubscriber

SILENCE_S = 30.0
GONE_S = 10.0
"""A feed that is silent for this long, and that nobody serves any more, will not go on."""
ANSWER_S = 5.0
"""A run that is watched from elsewhere gives its first event within this."""
LOOK_S = 0.1
"""Between two looks at the keyboard and the clock."""
PROBE_S = 2.0
"""Between two tries whether a silent feed is still served."""
REMEMBERED_KINDS = ("step", "evaluation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is watched."""

    host: str
    port: int
    title: str
    keys: ClientKeys | None = None
    history: Sequence[Event] = ()
    """What happened before."""

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self.port}"


async def accompany(source: Source) -> None:
    """The run's own console, until its end; a person who leaves the panel gets lines.

    Raises DeadlineExceeded when the feed is silent.
    """
    try:
        await _accompany(source)
    except BrokenPipeError:  # such as `| head -1`
        forget_stdout()
        sys.stderr.write("nobody reads the output any more; the run goes on\n")


async def _accompany(source: Source) -> None:
    with_panel = can_show(Console())
    outcome = await _show(source, patience_s=SILENCE_S) if with_panel else "left"
    if outcome == "left":
        if with_panel:
            sys.stdout.write("the panel is closed; the run goes on, and Ctrl-C stops it\n")
        # What happened before was told in its time.
        await _show(source, patience_s=SILENCE_S, view=Lines(sys.stdout))


async def watch(source: Source) -> None:
    """A console of somebody else, until the run's end or until it is left; the run goes on.

    Raises DeadlineExceeded, within seconds where nobody answers.
    """
    if not await listens(source.host, source.port, timeout_s=ANSWER_S):
        raise DeadlineExceeded(
            f"the metrics feed at {source.address}",
            "nobody listens there. Is the run going on? `speed-async console RUN_FOLDER` finds "
            "the address by itself; logs/learner.log names it as well (metrics feed at ...)",
            ANSWER_S,
        )
    view = None if can_show(Console()) else Lines(sys.stdout)
    if await _show(source, patience_s=ANSWER_S, view=view, history=source.history) == "left":
        sys.stdout.write("the console is closed; the run goes on\n")


def show_past(title: str, history: Sequence[Event]) -> None:
    """The last state of a run that is over."""
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
    """In these lines, or in a panel."""
    subscriber = FeedSubscriber(source.host, source.port, keys=source.keys)
    this_task = asyncio.current_task()
    assert this_task is not None
    # A cancelled task leaves the panel in order: last picture drawn, the terminal given back.
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
    heard_s, has_heard = clock(), False
    receiving: asyncio.Task[Event] | None = None
    try:
        while True:
            receiving = receiving or asyncio.create_task(subscriber.receive(SILENCE_S))
            await asyncio.wait((receiving,), timeout=LOOK_S)
            if receiving.done():
                event, receiving = receiving.result(), None
                heard_s, has_heard = clock(), True
                if event.kind not in REMEMBERED_KINDS or _wall_s(event) > known_s:
                    view.update(event)
                if event.kind == "end":
                    return "ended"
            silent_s = clock() - heard_s
            if view.look(silent_s) == "leave":
                return "left"
            await _give_up_if_gone(source, silent_s, patience_s, has_heard=has_heard)
    except DeadlineExceeded as error:
        raise _silent(source, error.waited_s, has_heard=has_heard) from None
    finally:
        if receiving is not None:
            receiving.cancel()


async def _give_up_if_gone(
    source: Source, silent_s: float, patience_s: float, *, has_heard: bool
) -> None:
    limit_s = GONE_S if has_heard else patience_s
    if silent_s < limit_s or (has_heard and silent_s % PROBE_S > LOOK_S):
        return
    if not has_heard or not await listens(source.host, source.port, timeout_s=PROBE_S):
        raise _silent(source, silent_s, has_heard=has_heard)


def _silent(source: Source, silent_s: float, *, has_heard: bool) -> DeadlineExceeded:
    what = (
        "an event. The run has ended without a word, or is out of reach"
        if has_heard
        else f"an event (none has come; {why_silent(source.keys)}). It may be another port than "
        "the feed's"
    )
    return DeadlineExceeded(f"the metrics feed at {source.address}", what, silent_s)


def _wall_s(event: Event) -> float:
    wall_s = event.values.get("wall_s")
    return float(wall_s) if isinstance(wall_s, (int, float)) else -1.0
