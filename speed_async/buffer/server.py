"""The service's shell: sockets, sinks and time around the pure core in service.py.

consumes   the hub's messages
waits for  the next message or the next tick, whichever is first
ends       when the core has said everything, or when it is cancelled
"""

import time
from collections.abc import Callable, Sequence

from speed_async.buffer.service import BufferService
from speed_async.errors import DeadlineExceeded
from speed_async.observe.metrics import Event
from speed_async.observe.sinks import Sink
from speed_async.wire.feed import FeedPublisher
from speed_async.wire.transport import Hub

KEPT_KINDS = ("step", "evaluation", "end")
"""Status events are for the live feed only."""


async def serve(
    service: BufferService,
    hub: Hub,
    feed: FeedPublisher,
    sinks: Sequence[Sink],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until the service has ended; closes the hub, the feed and the sinks."""
    interval_s = service.config.observe.status_interval_s
    next_tick_s = clock() + interval_s
    try:
        while not service.ended:
            wait_s = next_tick_s - clock()
            if wait_s > 0:
                try:
                    peer, message = await hub.receive(wait_s)
                except DeadlineExceeded:
                    continue
                service.handle(peer, message, clock())
            else:
                now_s = clock()
                service.tick(now_s, loop_lag_s=now_s - next_tick_s)
                next_tick_s = now_s + interval_s
            await _flush(service, hub, feed, sinks)
    finally:
        await hub.close()
        await feed.close()
        for sink in sinks:
            sink.close()


async def _flush(
    service: BufferService, hub: Hub, feed: FeedPublisher, sinks: Sequence[Sink]
) -> None:
    guard = service.gatekeeper
    while guard.to_mute:
        hub.mute(guard.to_mute.pop())
    guard.num_malformed, guard.num_muted = hub.rejected, hub.muted.num_muted
    outbox, service.outbox = service.outbox, []
    for peer, message in outbox:
        try:
            if not await hub.send(peer, message):
                service.unreachable(peer, "its connection is gone")
        except DeadlineExceeded as error:
            service.unreachable(peer, str(error))
    events, service.events = service.events, []
    for event in events:
        await feed.publish(event)
        _keep(event, sinks)


def _keep(event: Event, sinks: Sequence[Sink]) -> None:
    if event.kind in KEPT_KINDS:
        for sink in sinks:
            sink.write(event)
