"""The transport over ZeroMQ: the service binds a ROUTER, every peer connects a DEALER.

A peer's name is its routing identity; a peer that reconnects under its name takes its place again.
Frames of 64 KiB and more leave without a copy, so arrays of a sent message must not change.
"""

import asyncio
import re
from contextlib import suppress

import zmq

from speed_async.errors import DeadlineExceeded, ProtocolError
from speed_async.wire.codec import Frame, decode, encode
from speed_async.wire.curve import ClientKeys, Keys, ServerKeys, why_silent
from speed_async.wire.messages import Message, Rejected
from speed_async.wire.muting import MuteTable
from speed_async.wire.sockets import PolledSocket, bind, endpoint_at
from speed_async.wire.transport import Delivery, PeerName

QUEUED_MESSAGES = 64
"""Default bound of each queue of each peer, in messages; it bounds memory under a slow reader."""
SEND_DEADLINE_S = 30.0
MAX_REASON_CHARS = 500
MAX_NAMED = 4096
"""Rejected peers that the service is told of by name, at most, before it looks again."""
MAX_DROPPED = 64
"""Messages dropped in a row before the event loop has its turn."""

_PEER_NAME = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_GONE = (zmq.EHOSTUNREACH, zmq.ENOTCONN)


class ZmqHub:
    """The service's end. `rejected` counts refused messages, `undelivered` those to gone peers,
    `muted` holds the peers that are not listened to."""

    def __init__(self, socket: PolledSocket, port: int) -> None:
        self.port = port
        self.rejected = 0
        self.undelivered = 0
        self.muted = MuteTable()
        self.newly_rejected: list[PeerName] = []
        self._socket = socket

    def offer(self, peer: PeerName, message: Message) -> Delivery:
        """Queue a message if that can be done at once; `undelivered` counts gone peers."""
        try:
            self._socket.send_now([peer.encode(), *encode(message)])
        except zmq.Again:
            return Delivery.FULL
        except zmq.ZMQError as error:
            if error.errno not in _GONE:
                raise
            self.undelivered += 1
            return Delivery.GONE
        return Delivery.QUEUED

    def receive_now(self) -> tuple[PeerName, Message] | None:
        """The next valid message of any peer, if there is one already."""
        for _ in range(MAX_DROPPED):
            frames = self._socket.receive_now()
            if frames is None:
                return None
            if (received := self._opened(frames)) is not None:
                return received
        return None  # the rest of a flood of rubbish can wait

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """Next valid message of any peer. Raises DeadlineExceeded or TransportClosed."""
        clock = asyncio.get_running_loop().time
        ends_s = clock() + deadline_s
        while True:
            remaining_s = max(0.0, ends_s - clock())
            try:
                frames = await self._socket.receive(
                    deadline_s=remaining_s, whom="any peer", what="a message"
                )
            except DeadlineExceeded as error:
                raise DeadlineExceeded(error.whom, error.what, deadline_s) from None
            if (received := self._opened(frames)) is not None:
                return received
            if clock() >= ends_s:  # rubbish that never ends must not keep the caller
                raise DeadlineExceeded("any peer", "a message", deadline_s)

    def mute(self, peer: PeerName) -> None:
        self.muted.add(peer.encode())

    async def close(self) -> None:
        await self._socket.close()

    def _opened(self, frames: list[Frame]) -> tuple[PeerName, Message] | None:
        """Name and message; None when it is malformed, which its peer is told, or unread."""
        identity, *rest = frames
        if self.muted and bytes(identity) in self.muted:
            return None
        try:
            return _peer_name(bytes(identity)), decode(rest)
        except ProtocolError as error:
            self._reject(bytes(identity), str(error))
            return None

    def _reject(self, identity: bytes, reason: str) -> None:
        """Answer at once or not at all: a peer that sends rubbish may hold nobody up."""
        self.rejected += 1
        self.muted.add(identity)
        if len(self.newly_rejected) < MAX_NAMED:
            self.newly_rejected.append(identity.decode("ascii", "replace"))
        answer = encode(Rejected(reason=reason[:MAX_REASON_CHARS]))
        with suppress(zmq.ZMQError):
            self._socket.send_now([identity, *answer])


class ZmqLink:
    """A peer's end. It may be opened before the hub; what is sent waits for it."""

    def __init__(
        self, socket: PolledSocket, endpoint: str, send_deadline_s: float, keys: Keys | None
    ) -> None:
        self._socket = socket
        self._silence = f"a message (none has come; {why_silent(keys)})"
        self._whom = f"the service at {endpoint}"
        self._send_deadline_s = send_deadline_s

    async def send(self, message: Message) -> None:
        """Queue a message; waits while the outbox is full, then raises DeadlineExceeded."""
        what = f"room for {type(message).__name__} in the outbox"
        await self._socket.send(
            encode(message), deadline_s=self._send_deadline_s, whom=self._whom, what=what
        )

    async def receive(self, deadline_s: float) -> Message:
        """Next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        frames = await self._socket.receive(
            deadline_s=deadline_s, whom=self._whom, what=self._silence
        )
        self._silence = "a message"
        return decode(frames)

    async def close(self) -> None:
        await self._socket.close()


async def open_hub(
    host: str,
    port: int,
    *,
    outbox_messages: int = QUEUED_MESSAGES,
    inbox_messages: int = QUEUED_MESSAGES,
    keys: ServerKeys | None = None,
) -> ZmqHub:
    """Bind at `host`; port 0 picks a free one (`hub.port`). Queues are bounded for each peer.

    With `keys` none but allowed clients can connect; without, anyone who reaches the address.

    Raises ConfigError when the address cannot be bound.
    """
    socket = PolledSocket(
        zmq.ROUTER, outbox_messages=outbox_messages, inbox_messages=inbox_messages, keys=keys
    )
    # Mandatory routing makes a full queue and a gone peer known; else both drop silently.
    socket.raw.ROUTER_MANDATORY = 1
    socket.raw.ROUTER_HANDOVER = 1
    try:
        bound_port = bind(socket.raw, host, port, field="cluster.service_port")
    except BaseException:
        await socket.close()
        raise
    return ZmqHub(socket, bound_port)


async def open_link(
    host: str,
    port: int,
    name: PeerName,
    *,
    outbox_messages: int = QUEUED_MESSAGES,
    inbox_messages: int = QUEUED_MESSAGES,
    send_deadline_s: float = SEND_DEADLINE_S,
    keys: ClientKeys | None = None,
) -> ZmqLink:
    """Connect to the hub under `name`, now or whenever it is there.

    Raises ProtocolError for a name the hub would refuse.
    """
    _peer_name(name.encode())
    socket = PolledSocket(
        zmq.DEALER, outbox_messages=outbox_messages, inbox_messages=inbox_messages, keys=keys
    )
    socket.raw.IDENTITY = name.encode()
    endpoint = endpoint_at(socket.raw, host, port)
    socket.raw.connect(endpoint)
    return ZmqLink(socket, endpoint, send_deadline_s, keys)


def _peer_name(identity: bytes) -> PeerName:
    name = identity.decode("ascii", "replace")
    if not _PEER_NAME.fullmatch(name):
        raise ProtocolError(f"{identity[:100]!r} is no peer name: use letters, digits and . _ : -")
    return name
