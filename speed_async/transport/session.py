"""Reliable sessions: exactly-once, in-order delivery across reconnects and service restarts.

Each side numbers its messages, keeps them until the other side acknowledges them, and drops
duplicates. There is no retransmission on timeout: a side retransmits only after a Nack. The
receiver detects a gap from the next sequence number or from a Ping.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from speed_async.errors import DeadlineExceeded, IncarnationLost, SpeedAsyncError
from speed_async.transport.messages import Message
from speed_async.transport.transport import Link

PROBE_S = 1.0
"""Idle time after which a side with unacknowledged messages sends a Ping."""
NACK_INTERVAL_S = 0.5
"""Minimum time between two Nacks for the same gap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack(Message):
    """Acknowledges all messages up to `received`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nack(Message):
    """Requests retransmission of all messages after `received`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping(Message):
    """Asks whether all messages up to `sent` were received. The reply is Ack or Nack."""

    sent: int


M = TypeVar("M", bound=Message)


class Receipt(Enum):
    NEW = auto()
    DUPLICATE = auto()
    """A duplicate."""
    GAP = auto()
    """An earlier message is missing."""
    UNNUMBERED = auto()
    """Not numbered: a control message, or a peer without a session."""


@dataclass(kw_only=True, slots=True)
class Session(Generic[M]):
    """State of one side of a session with one peer. It performs no I/O. M is the type of the
    messages that it keeps."""

    sent: int = 0
    """Number of the last message; it may still wait for space in a queue."""
    received: int = 0
    """All messages of the peer up to this number were received."""
    queued: int = 0
    """All messages up to this number were passed to the transport."""
    _acknowledged: int = 0
    """Last received number that was acknowledged to the peer."""
    _held_at: tuple[int, int] | None = None
    """Messages sent after the first number and acknowledgements after the second are held back."""
    _kept: deque[M] = field(default_factory=deque)  # sent and unacknowledged, in order

    @property
    def num_unacked(self) -> int:
        return len(self._kept)

    @property
    def _num_forgotten(self) -> int:
        """Number of the last message that is not kept."""
        return self.sent - len(self._kept)

    @property
    def has_unsent(self) -> bool:
        return self.queued < (self.sent if self._held_at is None else self._held_at[0])

    @property
    def ack_pending(self) -> bool:
        """Whether received messages are not acknowledged yet."""
        return self._acknowledged < self._ackable

    @property
    def _ackable(self) -> int:
        return self.received if self._held_at is None else self._held_at[1]

    def hold(self) -> None:
        """Hold back messages and acknowledgements from now on until `release`."""
        if self._held_at is None:
            self._held_at = (self.sent, self.received)

    def release(self, upto: tuple[int, int]) -> None:
        """Release messages and acknowledgements up to these (sent, received) numbers.

        The hold ends if no later ones are held back.
        """
        self._held_at = None if upto == (self.sent, self.received) else upto

    def enqueue(self, message: M) -> None:
        """Keep a message as the next one; `next_unsent` numbers and returns it."""
        self.sent += 1
        self._kept.append(message)

    def next_unsent(self) -> M:
        """The first message not passed to the transport; call `mark_queued` after passing it."""
        message = self._kept[self.queued - self._num_forgotten]
        return message.numbered(self.queued + 1, self._ackable)

    def mark_queued(self) -> None:
        """Record that the message of `next_unsent` was passed to the transport."""
        self.queued += 1
        self._acknowledged = self._ackable

    def make_ack(self) -> Ack:
        """Create an acknowledgement of all that may be acknowledged."""
        self._acknowledged = self._ackable
        return Ack(received=self._acknowledged)

    def probe(self) -> Ping:
        """Create a Ping for the last message passed to the transport."""
        return Ping(sent=self.queued, received=self._ackable)

    def arrived(self, message: Message) -> Receipt:
        """Process the numbers of a received message."""
        self.forget(message.received)
        if message.number == 0:
            return Receipt.UNNUMBERED
        if message.number <= self.received:
            return Receipt.DUPLICATE
        if message.number > self.received + 1:
            return Receipt.GAP
        self.received = message.number
        return Receipt.NEW

    def rewind(self, received: int) -> bool:
        """Retransmit all messages after `received`. Returns False if they are no longer kept."""
        self.forget(received)
        if received < self._num_forgotten:
            return False
        self.queued = min(self.queued, received)
        return True

    def requeue_unacked(self) -> None:
        """Retransmit all unacknowledged messages: it is unknown which ones left the socket."""
        self.queued, self._acknowledged, self._held_at = self._num_forgotten, 0, None

    def discard_all(self) -> None:
        """Drop all kept messages: the peer will not return."""
        self._kept.clear()
        self.queued = self.sent

    def forget(self, received: int) -> None:
        """Drop messages that the peer acknowledged, up to this number."""
        while self._kept and self._num_forgotten < received:
            self._kept.popleft()
        self.queued = max(self.queued, min(received, self.sent))


class SessionLink:
    """A Link with exactly-once delivery, around a peer's link to the service.

    Lost messages are retransmitted only while `receive` runs.
    """

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._session = Session[Message]()
        self._sending = asyncio.Lock()
        self._last_nack = (-1, 0.0)
        """Number it acknowledged, and when it was sent."""
        self._settled = asyncio.Event()
        self.last_received_s = clock()
        """Time of the last message from the service."""

    @property
    def num_unacked(self) -> int:
        return self._session.num_unacked

    async def send(self, message: Message) -> None:
        """Send a message. Raises the errors of the link; the message is kept and retransmitted."""
        self._session.enqueue(message)
        self._settled.clear()
        await self._send_unsent()

    async def receive(self, deadline_s: float) -> Message:
        """Wait for the next message of the service.

        Raises DeadlineExceeded, TransportClosed or ProtocolError; IncarnationLost if the service
        requests messages that are no longer kept.
        """
        ends_s = self._clock() + deadline_s
        while True:
            left_s = ends_s - self._clock()
            try:
                message = await self._link.receive(max(0.0, min(left_s, PROBE_S)))
            except DeadlineExceeded as error:
                if left_s <= PROBE_S:
                    raise DeadlineExceeded(error.peer, error.what, deadline_s) from None
                await self._probe()
                continue
            self.last_received_s = self._clock()
            if await self._is_new(message):
                return message

    async def settle(self, deadline_s: float) -> None:
        """Wait until all messages are acknowledged; another task must be receiving.

        Raises DeadlineExceeded.
        """
        if not self._session.num_unacked:
            return
        try:
            await asyncio.wait_for(self._settled.wait(), deadline_s)
        except TimeoutError:
            raise DeadlineExceeded(
                "the buffer service", f"acknowledgement of {self.num_unacked} messages", deadline_s
            ) from None

    async def close(self) -> None:
        """Acknowledge received messages, then close."""
        if self._session.ack_pending:
            with suppress(SpeedAsyncError):
                await self._send_ack()
        await self._link.close()

    async def _is_new(self, message: Message) -> bool:
        arrival = self._session.arrived(message)
        if not self._session.num_unacked:
            self._settled.set()
        match message:
            case Ack():
                return False
            case Nack(received=received):
                if not self._session.rewind(received):
                    raise IncarnationLost(
                        f"the buffer service lost the messages after number {received}, and they "
                        "are no longer kept here"
                    )
                await self._send_unsent()
                return False
            case Ping(sent=sent):
                await (self._send_nack() if sent > self._session.received else self._send_ack())
                return False
            case _:
                pass
        if arrival is Receipt.GAP:
            await self._send_nack()
        return arrival in (Receipt.NEW, Receipt.UNNUMBERED)

    async def _send_unsent(self) -> None:
        async with self._sending:
            while self._session.has_unsent:
                message = self._session.next_unsent()
                await self._link.send(message)
                # Otherwise the session was rewound or the message acknowledged meanwhile.
                if message.number == self._session.queued + 1:
                    self._session.mark_queued()

    async def _probe(self) -> None:
        if self._session.has_unsent:
            await self._send_unsent()
        elif self._session.num_unacked:
            await self._link.send(self._session.probe())
        else:  # a restarted service can reach a peer only after the peer has sent something
            await self._send_ack()

    async def _send_ack(self) -> None:
        await self._link.send(self._session.make_ack())

    async def _send_nack(self) -> None:
        received, sent_s = self._last_nack
        now_s = self._clock()
        if received == self._session.received and now_s - sent_s < NACK_INTERVAL_S:
            return
        self._last_nack = (self._session.received, now_s)
        await self._link.send(Nack(received=self._session.received))
