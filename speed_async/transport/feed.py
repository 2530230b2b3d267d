"""The read-only metrics feed: the service publishes events, consoles subscribe, nobody answers.

One frame an event: msgpack [MAGIC, PROTOCOL_VERSION, kind, {key: value}]. Publishing never waits; a
subscriber too slow for it misses events and catches up with the next status.
"""

import asyncio
from typing import get_args

import zmq

from speed_async.errors import ProtocolError, TransportClosed
from speed_async.observability.metrics import Event, EventKind
from speed_async.transport import fields
from speed_async.transport.codec import MAGIC, MAX_HEADER_BYTES, Frame, pack_header, unpack_header
from speed_async.transport.curve import ClientKeys, ServerKeys, secure, why_silent
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
"""Events held for one slow subscriber, and by it."""
MAX_SUBSCRIPTION_BYTES = 1024
"""The publisher accepts nothing larger from a subscriber than its handshake and a topic."""

_KINDS = frozenset(get_args(EventKind))
_are_values = fields.map_of(fields.is_scalar)


def encode_event(event: Event) -> bytes:
    """Raises ProtocolError for values that are no plain scalars."""
    _check_event(event.kind, event.values)
    return pack_header([MAGIC, PROTOCOL_VERSION, event.kind, event.values])


def decode_event(frame: Frame) -> Event:
    """Raises ProtocolError, and nothing else, whatever the bytes are."""
    header = unpack_header(frame)
    if len(header) != 4:
        raise ProtocolError(f"an event of {len(header)} parts where 4 belong")
    kind, values = header[2:]
    _check_event(kind, values)
    return Event(kind=kind, values=values)


class FeedPublisher:
    """Binds at once; `port` is the one in use. Raises ConfigError when it cannot be bound."""

    def __init__(self, host: str, port: int, *, keys: ServerKeys | None = None) -> None:
        self._context: zmq.Context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket = self._context.socket(zmq.PUB)
        self._socket.SNDHWM = QUEUED_EVENTS
        set_common_options(self._socket, max_frame_bytes=MAX_SUBSCRIPTION_BYTES)
        self._authenticator = secure(self._socket, keys)
        try:
            self.port = bind(self._socket, host, port, field="cluster.feed_port")
        except BaseException:
            self._socket.close(linger=0)
            end_context(self._context, self._authenticator)
            raise

    async def publish(self, event: Event) -> None:
        """Hand an event to those who listen now.

        Raises ProtocolError for an unfit event, TransportClosed after `close`.
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
    """Made in a running event loop; connects now or whenever the publisher is there."""

    def __init__(self, host: str, port: int, *, keys: ClientKeys | None = None) -> None:
        self._socket = PolledSocket(
            zmq.SUB,
            outbox_messages=QUEUED_EVENTS,
            inbox_messages=QUEUED_EVENTS,
            max_frame_bytes=MAX_HEADER_BYTES,
            keys=keys,
        )
        self._silence = f"an event (none has come; {why_silent(keys)})"
        endpoint = endpoint_at(self._socket.raw, host, port)
        self._whom = f"the metrics feed at {endpoint}"
        self._socket.raw.SUBSCRIBE = b""
        self._socket.raw.connect(endpoint)

    async def receive(self, deadline_s: float) -> Event:
        """Next event. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        frames = await self._socket.receive(
            deadline_s=deadline_s, whom=self._whom, what=self._silence
        )
        self._silence = "an event"
        return decode_event(frames[0])

    async def close(self) -> None:
        await self._socket.close()


def _check_event(kind: object, values: object) -> None:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ProtocolError(f"unknown event kind {str(kind)[:60]!r}")
    if not _are_values(values):
        raise ProtocolError(f"the values of a {kind} event are no map of plain scalars")
