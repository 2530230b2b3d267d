"""The console: follows a feed and shows it, as a panel on a terminal and as lines elsewhere."""

import asyncio
import signal
import sys

from rich.console import Console

from speed_async.errors import DeadlineExceeded
from speed_async.observe.lines import Lines
from speed_async.observe.panel import Panel, can_show
from speed_async.wire.curve import ClientKeys
from speed_async.wire.feed import FeedSubscriber

SILENCE_S = 30.0


async def follow_feed(host: str, port: int, title: str, keys: ClientKeys | None = None) -> None:
    """Show events until the run's end event. Raises DeadlineExceeded when the feed is silent."""
    subscriber = FeedSubscriber(host, port, keys=keys)
    terminal = Console()
    this_task = asyncio.current_task()
    assert this_task is not None
    # A cancelled task leaves the panel in order: last picture drawn, cursor and echo given back.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    try:
        if can_show(terminal):
            with Panel(terminal, title) as panel:
                await _follow(subscriber, panel, f"{host}:{port}")
        else:
            await _follow(subscriber, Lines(sys.stdout), f"{host}:{port}")
    except asyncio.CancelledError:
        return
    finally:
        await subscriber.close()


async def _follow(subscriber: FeedSubscriber, view: Panel | Lines, where: str) -> None:
    while True:
        try:
            event = await subscriber.receive(SILENCE_S)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"the metrics feed at {where}", f"{error.what}; is the run still alive?", SILENCE_S
            ) from None
        view.update(event)
        if event.kind == "end":
            return
