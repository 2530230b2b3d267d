"""The read-only metrics feed: the service publishes events and consoles subscribe.

One frame per event: msgpack [MAGIC, PROTOCOL_VERSION, kind, {key: value}]. Publishing never blocks.
A slow subscriber misses events and is up to date again with the next status.
"""

import asyncio
from typing import cast, get_args

import zmq

from speed_async.errors import ProtocolError, TransportClosed
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.transport import fields
from speed_async.transport.codec import MAGIC, MAX_HEADER_BYTES, Frame, pack_header, unpack_header
from speed_async.transport.curve import ClientKeys, ServerKeys, configure_curve, silence_hint
from speed_async.transport.messages import PROTOCOL_VERSION
from speed_async.transport.sockets import (
    LINGER_S,
    PolledSocket,
    bind,
    end_context,
    endpoint_at,
    set_common_options,
)

QUEUED_EVENTS = 256
"""Queue length per subscriber, at the publisher and at the subscriber."""
MAX_SUBSCRIPTION_BYTES = 1024
"""Largest frame that the publisher accepts: a handshake or a topic."""

_KINDS = frozenset(get_args(EventKind))
_are_values = fields.map_of(fields.is_scalar)


def encode_event(event: Event) -> bytes:
    """Encode an event. Raises ProtocolError for values that are not plain scalars."""
    _check_event(event.kind, cast("fields.Plain", event.values))
    return pack_header([MAGIC, PROTOCOL_VERSION, event.kind, event.values])


def decode_event(frame: Frame) -> Event:
    """Decode an event. Raises only ProtocolError, for any input."""
    header = unpack_header(frame)
    if len(header) != 4:
        raise ProtocolError(f"the event has {len(header)} elements, expected 4")
    kind, values = header[2:]
    _check_event(kind, values)
    return Event(kind=cast("EventKind", kind), values=cast("dict[str, Value]", values))


class FeedPublisher:
    """Binds on construction; `port` is the bound port. Raises ConfigError if binding fails."""

    def __init__(self, host: str, port: int, *, keys: ServerKeys | None = None) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUB)
        self._socket.SNDHWM = QUEUED_EVENTS
        set_common_options(self._socket, max_frame_bytes=MAX_SUBSCRIPTION_BYTES)
        self._authenticator = configure_curve(self._socket, keys)
        try:
            self.port = bind(self._socket, host, port, field="cluster.feed_port")
        except BaseException:
            self._socket.close(linger=0)
            end_context(self._context, self._authenticator)
            raise

    async def publish(self, event: Event) -> None:
        """Send an event to the current subscribers.

        Raises ProtocolError for an invalid event, TransportClosed after `close`.
        """
        if self._socket.closed:
            raise TransportClosed("the metrics feed is closed")
        self._socket.send(encode_event(event), zmq.NOBLOCK)

    async def close(self) -> None:
        """Flush for at most LINGER_S. May be called twice."""
        if not self._socket.closed:
            self._socket.close(linger=int(LINGER_S * 1000))
            await asyncio.shield(asyncio.to_thread(end_context, self._context, self._authenticator))


class FeedSubscriber:
    """Create in a running event loop. Connects as soon as the publisher is available."""

    def __init__(self, host: str, port: int, *, keys: ClientKeys | None = None) -> None:
        self._socket = PolledSocket(
            zmq.SUB,
            outbox_messages=QUEUED_EVENTS,
            inbox_messages=QUEUED_EVENTS,
            max_frame_bytes=MAX_HEADER_BYTES,
            keys=keys,
        )
        self._awaited = f"an event (none received so far; {silence_hint(keys)})"
        endpoint = endpoint_at(self._socket.raw, host, port)
        self._source = f"the metrics feed at {endpoint}"
        self._socket.raw.SUBSCRIBE = b""
        self._socket.raw.connect(endpoint)

    async def receive(self, deadline_s: float) -> Event:
        """Wait for the next event. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        frames = await self._socket.receive(
            deadline_s=deadline_s, peer=self._source, what=self._awaited
        )
        self._awaited = "an event"
        return decode_event(frames[0])

    async def close(self) -> None:
        await self._socket.close()


def _check_event(kind: fields.Plain, values: fields.Plain) -> None:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ProtocolError(f"unknown event kind {str(kind)[:60]!r}")
    if not _are_values(values):
        raise ProtocolError(f"the values of a {kind} event must be a map of plain scalars")
