"""A transport within one event loop, for tests and single-process runs.

Messages are encoded to bytes with the same codec, so the two ends share no mutable state.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from speed_async.errors import DeadlineExceeded, ProtocolError, TransportClosed
from speed_async.transport.codec import Frame, decode, encode
from speed_async.transport.messages import Message, Rejected
from speed_async.transport.muting import BlockedPeers
from speed_async.transport.transport import Delivery, PeerName

Item = TypeVar("Item")

QUEUED_MESSAGES = 64
SEND_DEADLINE_S = 30.0


class InProcessHub:
    """The service's end. `rejected` and `undelivered` have the semantics of the ZeroMQ hub."""

    def __init__(
        self, *, queued_messages: int = QUEUED_MESSAGES, send_deadline_s: float = SEND_DEADLINE_S
    ) -> None:
        self.rejected = 0
        self.undelivered = 0
        self.muted = BlockedPeers()
        self.newly_rejected: list[PeerName] = []
        self._queued_messages = queued_messages
        self._send_deadline_s = send_deadline_s
        self._inbox: _Mailbox[tuple[PeerName, list[bytes]]] = _Mailbox(queued_messages)
        self._outboxes: dict[PeerName, _Mailbox[list[bytes]]] = {}

    def connect(self, name: PeerName) -> "InProcessLink":
        """A link with this name; replaces an earlier link of the same name."""
        self._outboxes[name] = _Mailbox(self._queued_messages)
        return InProcessLink(name, self._inbox, self._outboxes[name], self._send_deadline_s)

    def offer(self, peer: PeerName, message: Message) -> Delivery:
        """Queue a message without waiting; `undelivered` counts messages to closed peers."""
        if self._inbox.closed:
            raise TransportClosed("the in-process service is closed")
        outbox = self._outboxes.get(peer)
        if outbox is None or outbox.closed:
            self.undelivered += 1
            return Delivery.GONE
        put = outbox.put_now(_as_bytes(encode(message)))
        return Delivery.QUEUED if put else Delivery.FULL

    def receive_now(self) -> tuple[PeerName, Message] | None:
        """The next valid message from any peer, or None when no message is queued."""
        while (item := self._inbox.get_now()) is not None:
            if (received := self._decoded(*item)) is not None:
                return received
        return None

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """The next valid message from any peer. Raises DeadlineExceeded or TransportClosed."""
        clock = asyncio.get_running_loop().time
        ends_s = clock() + deadline_s
        while True:
            remaining_s = max(0.0, ends_s - clock())
            try:
                peer, frames = await self._inbox.get(
                    remaining_s, source="any peer", what="a message"
                )
            except DeadlineExceeded as error:
                raise DeadlineExceeded(error.peer, error.what, deadline_s) from None
            if (received := self._decoded(peer, frames)) is not None:
                return received

    def key_of(self, peer: PeerName) -> str:
        return ""

    def mute(self, peer: PeerName) -> None:
        self.muted.add(peer.encode())

    def _decoded(self, peer: PeerName, frames: list[bytes]) -> tuple[PeerName, Message] | None:
        if peer.encode() in self.muted:
            return None
        try:
            return peer, decode(frames)
        except ProtocolError as error:
            self.rejected += 1
            self.mute(peer)
            self.newly_rejected.append(peer)
            self._outboxes[peer].put_now(_as_bytes(encode(Rejected(reason=str(error)))))
            return None

    async def close(self) -> None:
        """Links still receive queued messages, then raise TransportClosed."""
        await self._inbox.close(keep_items=False)
        for outbox in self._outboxes.values():
            await outbox.close(keep_items=True)


class InProcessLink:
    """A peer's end."""

    def __init__(
        self,
        name: PeerName,
        inbox: "_Mailbox[tuple[PeerName, list[bytes]]]",
        outbox: "_Mailbox[list[bytes]]",
        send_deadline_s: float,
    ) -> None:
        self._name = name
        self._hub_inbox = inbox
        self._outbox = outbox
        self._send_deadline_s = send_deadline_s

    async def send(self, message: Message) -> None:
        """Queue a message. Waits while the hub's inbox is full; raises DeadlineExceeded."""
        await self.send_frames(encode(message))

    async def send_frames(self, frames: Sequence[Frame]) -> None:
        """Queue frames without validation."""
        if self._outbox.closed:
            raise TransportClosed(f"link {self._name} is closed")
        await self._hub_inbox.put(
            (self._name, _as_bytes(frames)),
            self._send_deadline_s,
            source="the in-process service",
            what="space in its inbox",
        )

    async def receive(self, deadline_s: float) -> Message:
        """Next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        source = "the in-process service"
        return decode(await self._outbox.get(deadline_s, source=source, what="a message"))

    async def close(self) -> None:
        await self._outbox.close(keep_items=False)


class _Mailbox(Generic[Item]):
    """A bounded queue that can be closed while tasks wait on it."""

    def __init__(self, capacity: int) -> None:
        self.closed = False
        self._capacity = capacity
        self._items: deque[Item] = deque()
        self._waiters: set[asyncio.Future[None]] = set()

    async def put(self, item: Item, deadline_s: float, *, source: str, what: str) -> None:
        await self._wait_until(lambda: len(self._items) < self._capacity, deadline_s, source, what)
        if not self.put_now(item):
            raise TransportClosed(f"closed while waiting for {source}: {what}")

    async def get(self, deadline_s: float, *, source: str, what: str) -> Item:
        await self._wait_until(lambda: len(self._items) > 0, deadline_s, source, what)
        item = self.get_now()
        if item is None:
            raise TransportClosed(f"closed while waiting for {source}: {what}")
        return item

    def put_now(self, item: Item) -> bool:
        """Put without waiting; False when the queue is full or closed."""
        if self.closed or len(self._items) >= self._capacity:
            return False
        self._items.append(item)
        self._notify()
        return True

    def get_now(self) -> Item | None:
        if not self._items:
            return None
        item = self._items.popleft()
        self._notify()
        return item

    async def close(self, *, keep_items: bool) -> None:
        self.closed = True
        if not keep_items:
            self._items.clear()
        self._notify()

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait_until(
        self, is_ready: Callable[[], bool], deadline_s: float, source: str, what: str
    ) -> None:
        """Wait until `is_ready()` or closed. Raises DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        while not (self.closed or is_ready()):
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout(max(0.0, deadline_s - (loop.time() - started_s))):
                    await waiter
            except TimeoutError:
                raise DeadlineExceeded(source, what, loop.time() - started_s) from None
            finally:
                self._waiters.discard(waiter)


def _as_bytes(frames: Sequence[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]
