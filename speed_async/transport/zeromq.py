"""The transport over ZeroMQ: the service binds a ROUTER and every peer connects a DEALER.

A peer that reconnects keeps its name (ownership of names: transport/peer_names.py). After a restart
the service can send to a peer only once the peer has sent a message. Frames of 64 KiB or more are
sent without a copy, so do not modify the arrays of a sent message.
"""

import asyncio
from contextlib import suppress

import zmq

from speed_async.errors import DeadlineExceeded, ProtocolError
from speed_async.transport.codec import Frame, decode, encode
from speed_async.transport.curve import ClientKeys, Keys, ServerKeys, silence_hint
from speed_async.transport.messages import Message, Rejected
from speed_async.transport.muting import BlockedPeers
from speed_async.transport.peer_names import PeerNames, claimed_name, new_identity
from speed_async.transport.session import Ack
from speed_async.transport.sockets import HEARTBEAT_TIMEOUT_S, PolledSocket, bind, endpoint_at
from speed_async.transport.transport import Delivery, PeerName

QUEUED_MESSAGES = 64
"""Default length of each queue of each peer, in messages. Bounds memory with a slow reader."""
SEND_DEADLINE_S = 30.0
MAX_REASON_CHARS = 500
MAX_NAMED = 4096
"""Maximum length of `newly_rejected` until the service clears it."""
MAX_DROPPED = 64
"""Consecutive messages to drop before yielding to the event loop."""

_GONE = (zmq.EHOSTUNREACH, zmq.ENOTCONN)


class ZmqHub:
    """The Hub of the service.

    `rejected` counts malformed messages, `undelivered` counts messages to disconnected peers,
    `muted` contains the identities whose messages are dropped.
    """

    def __init__(self, socket: PolledSocket, port: int, *, has_keys: bool) -> None:
        self.port = port
        self.rejected = 0
        self.undelivered = 0
        self.muted = BlockedPeers()
        self.newly_rejected: list[PeerName] = []
        self._socket = socket
        self._has_keys = has_keys
        self._names = PeerNames(self._is_connected)

    def offer(self, peer: PeerName, message: Message) -> Delivery:
        """Queue a message without waiting. Counts it in `undelivered` if the peer is gone."""
        owner = self._names.owner(peer)
        delivery = Delivery.GONE if owner is None else self._send(owner.identity, message)
        self.undelivered += delivery is Delivery.GONE
        return delivery

    def key_of(self, peer: PeerName) -> str:
        owner = self._names.owner(peer)
        return "" if owner is None else owner.key

    def receive_now(self) -> tuple[PeerName, Message] | None:
        """The next valid message of any peer if one is available, else None."""
        for _ in range(MAX_DROPPED):
            frames = self._socket.receive_now()
            if frames is None:
                return None
            if (received := self._decode_from_peer(frames)) is not None:
                return received
        return None  # yield to the event loop during a flood of malformed messages

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """Wait for the next valid message of any peer.

        Raises DeadlineExceeded or TransportClosed.
        """
        clock = asyncio.get_running_loop().time
        ends_s = clock() + deadline_s
        while True:
            remaining_s = max(0.0, ends_s - clock())
            try:
                frames = await self._socket.receive(
                    deadline_s=remaining_s, peer="any peer", what="a message"
                )
            except DeadlineExceeded as error:
                raise DeadlineExceeded(error.peer, error.what, deadline_s) from None
            if (received := self._decode_from_peer(frames)) is not None:
                return received
            if clock() >= ends_s:  # endless malformed input must not block the caller
                raise DeadlineExceeded("any peer", "a message", deadline_s)

    def mute(self, peer: PeerName) -> None:
        owner = self._names.owner(peer)
        if owner is not None:
            self.muted.add(owner.identity)

    async def close(self) -> None:
        await self._socket.close()

    def _decode_from_peer(self, frames: list[Frame]) -> tuple[PeerName, Message] | None:
        """Decode a message and resolve the name of its peer.

        Returns None for a muted peer, and for a message that is malformed or uses the name of
        another peer; such a message is rejected.
        """
        identity = bytes(frames[0])
        if self.muted and identity in self.muted:
            return None
        try:
            message = decode(frames[1:])
            name = self._names.name(identity)
            return name or self._names.claim(identity, self._key(frames[0])), message
        except ProtocolError as error:
            self._reject(identity, str(error))
            return None

    def _reject(self, identity: bytes, reason: str) -> None:
        """Mute the peer and send Rejected without waiting: a bad peer must not delay others."""
        self.rejected += 1
        self.muted.add(identity)
        with suppress(ProtocolError):
            name = claimed_name(identity)
            owner = self._names.owner(name)
            is_owner = owner is None or owner.identity == identity
            if is_owner and len(self.newly_rejected) < MAX_NAMED:
                self.newly_rejected.append(name)
        with suppress(zmq.ZMQError):
            self._send(identity, Rejected(reason=reason[:MAX_REASON_CHARS]))

    def _send(self, identity: bytes, message: Message) -> Delivery:
        try:
            self._socket.send_now([identity, *encode(message)])
        except zmq.Again:
            return Delivery.FULL
        except zmq.ZMQError as error:
            if error.errno not in _GONE:
                raise
            return Delivery.GONE
        return Delivery.QUEUED

    def _is_connected(self, identity: bytes) -> bool:
        return self._send(identity, Ack()) is not Delivery.GONE

    def _key(self, frame: Frame) -> str:
        """The public key of the sender of a frame, as set by the authenticator."""
        if not self._has_keys:
            return ""
        assert isinstance(frame, memoryview)
        received = frame.obj
        assert isinstance(received, zmq.Frame)
        return str(received.get("User-Id"))


class ZmqLink:
    """The Link of a peer. It may be opened before the hub; messages are queued until then."""

    def __init__(
        self, socket: PolledSocket, endpoint: str, send_deadline_s: float, keys: Keys | None
    ) -> None:
        self._socket = socket
        self._awaited = f"a message (none received so far; {silence_hint(keys)})"
        self._peer = f"the service at {endpoint}"
        self._send_deadline_s = send_deadline_s

    async def send(self, message: Message) -> None:
        """Queue a message; waits while the outbox is full. Raises DeadlineExceeded."""
        what = f"space for {type(message).__name__} in the outbox"
        await self._socket.send(
            encode(message), deadline_s=self._send_deadline_s, peer=self._peer, what=what
        )

    async def receive(self, deadline_s: float) -> Message:
        """Wait for the next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        frames = await self._socket.receive(
            deadline_s=deadline_s, peer=self._peer, what=self._awaited
        )
        self._awaited = "a message"
        return decode(frames)

    async def close(self) -> None:
        await self._socket.close()


async def open_hub(
    host: str,
    port: int,
    *,
    outbox_messages: int = QUEUED_MESSAGES,
    inbox_messages: int = QUEUED_MESSAGES,
    silence_s: float = HEARTBEAT_TIMEOUT_S,
    keys: ServerKeys | None = None,
    field: str = "cluster.service_port",
) -> ZmqHub:
    """Bind to `host`; port 0 picks a free port (`hub.port`). The queues of each peer are bounded.

    A peer is disconnected, and messages queued for it are lost, when its process ends or nothing
    arrives from it for `silence_s`.

    With `keys` only allowed clients can connect; without, any client that reaches the address.

    Raises ConfigError if the address cannot be bound; it names `field` for the port.
    """
    socket = PolledSocket(
        zmq.ROUTER,
        outbox_messages=outbox_messages,
        inbox_messages=inbox_messages,
        silence_s=silence_s,
        keys=keys,
    )
    # Mandatory routing reports full queues and disconnected peers; by default such messages are
    # dropped silently. Handover lets a peer reconnect before its old connection times out.
    socket.raw.ROUTER_MANDATORY = 1
    socket.raw.ROUTER_HANDOVER = 1
    try:
        bound_port = bind(socket.raw, host, port, field=field)
    except BaseException:
        await socket.close()
        raise
    return ZmqHub(socket, bound_port, has_keys=keys is not None)


async def open_link(
    host: str,
    port: int,
    name: PeerName,
    *,
    outbox_messages: int = QUEUED_MESSAGES,
    inbox_messages: int = QUEUED_MESSAGES,
    silence_s: float = HEARTBEAT_TIMEOUT_S,
    send_deadline_s: float = SEND_DEADLINE_S,
    keys: ClientKeys | None = None,
) -> ZmqLink:
    """Connect to the hub as `name`, as soon as the hub is available; again whenever nothing arrives
    for `silence_s`.

    Raises ProtocolError for an invalid name.
    """
    identity = new_identity(name)
    socket = PolledSocket(
        zmq.DEALER,
        outbox_messages=outbox_messages,
        inbox_messages=inbox_messages,
        silence_s=silence_s,
        keys=keys,
    )
    socket.raw.IDENTITY = identity
    endpoint = endpoint_at(socket.raw, host, port)
    socket.raw.connect(endpoint)
    return ZmqLink(socket, endpoint, send_deadline_s, keys)
