"""The transport inside one event loop, for tests and single-process runs.

Messages pass as bytes through the same codec, so no end can change what the other holds.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from speed_async.errors import DeadlineExceeded, ProtocolError, TransportClosed
from speed_async.wire.codec import Frame, decode, encode
from speed_async.wire.messages import Message, Rejected
from speed_async.wire.muting import MuteTable
from speed_async.wire.transport import PeerName

Item = TypeVar("Item")

QUEUED_MESSAGES = 64
SEND_DEADLINE_S = 30.0


class InProcessHub:
    """The service's end; `rejected` and `undelivered` count as in the ZeroMQ hub."""

    def __init__(
        self, *, queued_messages: int = QUEUED_MESSAGES, send_deadline_s: float = SEND_DEADLINE_S
    ) -> None:
        self.rejected = 0
        self.undelivered = 0
        self.muted = MuteTable()
        self._queued_messages = queued_messages
        self._send_deadline_s = send_deadline_s
        self._inbox: _Mailbox[tuple[PeerName, list[bytes]]] = _Mailbox(queued_messages)
        self._outboxes: dict[PeerName, _Mailbox[list[bytes]]] = {}

    def connect(self, name: PeerName) -> "InProcessLink":
        """A link under `name`; an earlier link of that name loses its place."""
        self._outboxes[name] = _Mailbox(self._queued_messages)
        return InProcessLink(name, self._inbox, self._outboxes[name], self._send_deadline_s)

    async def send(self, peer: PeerName, message: Message) -> bool:
        """Queue a message; waits while the peer's queue is full, then raises DeadlineExceeded."""
        frames = _as_bytes(encode(message))
        outbox = self._outboxes.get(peer)
        try:
            if outbox is None:
                raise TransportClosed(f"{peer} is not connected")
            what = f"room for {type(message).__name__} in its queue"
            await outbox.put(frames, self._send_deadline_s, whom=peer, what=what)
        except TransportClosed:
            if self._inbox.closed:
                raise
            self.undelivered += 1
            return False
        return True

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """Next valid message of any peer. Raises DeadlineExceeded or TransportClosed."""
        clock = asyncio.get_running_loop().time
        ends_s = clock() + deadline_s
        while True:
            remaining_s = max(0.0, ends_s - clock())
            try:
                peer, frames = await self._inbox.get(remaining_s, whom="any peer", what="a message")
            except DeadlineExceeded as error:
                raise DeadlineExceeded(error.whom, error.what, deadline_s) from None
            if peer.encode() in self.muted:
                continue
            try:
                return peer, decode(frames)
            except ProtocolError as error:
                self.rejected += 1
                self.mute(peer)
                answer = _as_bytes(encode(Rejected(reason=str(error))))
                await self._outboxes[peer].put_if_room(answer)

    def mute(self, peer: PeerName) -> None:
        self.muted.add(peer.encode())

    async def close(self) -> None:
        """Links still receive what was sent to them, then TransportClosed."""
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
        self._own = outbox
        self._send_deadline_s = send_deadline_s

    async def send(self, message: Message) -> None:
        """Queue a message; waits while the hub's inbox is full, then raises DeadlineExceeded."""
        await self.send_frames(encode(message))

    async def send_frames(self, frames: Sequence[Frame]) -> None:
        """Queue frames as they are, valid or not."""
        if self._own.closed:
            raise TransportClosed(f"link {self._name} is closed")
        await self._hub_inbox.put(
            (self._name, _as_bytes(frames)),
            self._send_deadline_s,
            whom="the in-process service",
            what="room in its inbox",
        )

    async def receive(self, deadline_s: float) -> Message:
        """Next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        whom = "the in-process service"
        return decode(await self._own.get(deadline_s, whom=whom, what="a message"))

    async def close(self) -> None:
        await self._own.close(keep_items=False)


class _Mailbox(Generic[Item]):
    """A bounded queue that can be closed under those who wait on it."""

    def __init__(self, capacity: int) -> None:
        self.closed = False
        self._capacity = capacity
        self._items: deque[Item] = deque()
        self._changed = asyncio.Condition()

    async def put(self, item: Item, deadline_s: float, *, whom: str, what: str) -> None:
        async with self._changed:
            await self._until(lambda: len(self._items) < self._capacity, deadline_s, whom, what)
            if self.closed:
                raise TransportClosed(f"closed while waiting for {whom}: {what}")
            self._items.append(item)
            self._changed.notify_all()

    async def get(self, deadline_s: float, *, whom: str, what: str) -> Item:
        async with self._changed:
            await self._until(lambda: len(self._items) > 0, deadline_s, whom, what)
            if not self._items:
                raise TransportClosed(f"closed while waiting for {whom}: {what}")
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    async def put_if_room(self, item: Item) -> None:
        """Put at once or not at all."""
        async with self._changed:
            if not self.closed and len(self._items) < self._capacity:
                self._items.append(item)
                self._changed.notify_all()

    async def close(self, *, keep_items: bool) -> None:
        async with self._changed:
            self.closed = True
            if not keep_items:
                self._items.clear()
            self._changed.notify_all()

    async def _until(
        self, is_ready: Callable[[], bool], deadline_s: float, whom: str, what: str
    ) -> None:
        started_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(deadline_s):
                await self._changed.wait_for(lambda: self.closed or is_ready())
        except TimeoutError:
            waited_s = asyncio.get_running_loop().time() - started_s
            raise DeadlineExceeded(whom, what, waited_s) from None


def _as_bytes(frames: Sequence[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]
