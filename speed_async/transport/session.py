"""A conversation that survives lost connections and a restarted service: every message once, in
order.

Each side numbers what it says, keeps it until the other side has heard it, and drops what comes
twice. Nothing is sent again on suspicion: only when the other side says what it misses, which it
notices at the next number, or at a probe.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from speed_async.errors import DeadlineExceeded, GivenUp, SpeedAsyncError
from speed_async.transport.messages import Message
from speed_async.transport.transport import Link

PROBE_S = 1.0
"""Silence after which a side with something unheard asks whether it has come."""
ASK_AGAIN_S = 0.5
"""What is missing is asked for once in this time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack(Message):
    """Nothing to say but `heard`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nack(Message):
    """Say again everything after `heard`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping(Message):
    """Has everything up to `sent` come? Answered by Ack or Nack."""

    sent: int


class Receipt(Enum):
    NEW = auto()
    AGAIN = auto()
    """It had come before."""
    GAP = auto()
    """Something before it is missing."""
    OUTSIDE = auto()
    """Not numbered: control, or a peer that holds no session."""


@dataclass(kw_only=True, slots=True)
class Session:
    """One side's view of a conversation with one peer. Pure state, no I/O."""

    sent: int = 0
    """Number of the last message there is; it may still wait for room in a queue."""
    heard: int = 0
    """Everything of the peer up to this number has come."""
    queued: int = 0
    """Everything up to this number was handed to the transport."""
    _told: int = 0
    _held_at: tuple[int, int] | None = None
    """What was said past the first number, and heard past the second, is not to be told yet."""
    _kept: deque[Message] = field(default_factory=deque)  # said and not heard, in order

    @property
    def num_unacked(self) -> int:
        return len(self._kept)

    @property
    def has_unsent(self) -> bool:
        return self.queued < (self.sent if self._held_at is None else self._held_at[0])

    @property
    def ack_pending(self) -> bool:
        """The peer has not been told yet what has come of it."""
        return self._told < self._may_confirm

    @property
    def _may_confirm(self) -> int:
        return self.heard if self._held_at is None else self._held_at[1]

    def hold(self) -> None:
        """What is said and heard from now on stays here until `release`."""
        if self._held_at is None:
            self._held_at = (self.sent, self.heard)

    def release(self, upto: tuple[int, int]) -> None:
        """Let go what was said and heard up to these numbers; all of it where there is no more."""
        self._held_at = None if upto == (self.sent, self.heard) else upto

    def say(self, message: Message) -> None:
        """Number and keep a message; `next_unsent` gives it out."""
        self.sent += 1
        self._kept.append(replace(message, number=self.sent))

    def next_unsent(self) -> Message:
        """The first message not handed to the transport; `queued_one` says when it was."""
        first = self.sent - len(self._kept) + 1
        return replace(self._kept[self.queued + 1 - first], heard=self._may_confirm)

    def queued_one(self) -> None:
        self.queued += 1
        self._told = self._may_confirm

    def word(self) -> Ack:
        self._told = self._may_confirm
        return Ack(heard=self._told)

    def probe(self) -> Ping:
        return Ping(sent=self.queued, heard=self._may_confirm)

    def arrived(self, message: Message) -> Receipt:
        """Take note of a message's numbers."""
        self.forget(message.heard)
        if message.number == 0:
            return Receipt.OUTSIDE
        if message.number <= self.heard:
            return Receipt.AGAIN
        if message.number > self.heard + 1:
            return Receipt.GAP
        self.heard = message.number
        return Receipt.NEW

    def rewind(self, heard: int) -> bool:
        """Say again everything after `heard`; False when that is not kept any more."""
        self.forget(heard)
        if heard < self.sent - len(self._kept):
            return False
        self.queued = min(self.queued, heard)
        return True

    def rewind_unacked(self) -> None:
        """Say again whatever was not heard: nobody knows what left the socket."""
        self.queued, self._told, self._held_at = self.sent - len(self._kept), 0, None

    def forget_all(self) -> None:
        """The peer is gone for good."""
        self._kept.clear()
        self.queued = self.sent

    def forget(self, heard: int) -> None:
        """The peer has heard everything up to this number."""
        while self._kept and self._kept[0].number <= heard:
            self._kept.popleft()
        self.queued = max(self.queued, min(heard, self.sent))


class SessionLink:
    """A Link that says everything once: it wraps a peer's link to the service.

    Its `receive` must run now and then for what was lost to be said again.
    """

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._session = Session()
        self._sending = asyncio.Lock()
        self._asked = (-1, 0.0)
        self._settled = asyncio.Event()
        self.last_heard_s = clock()
        """When anything last came from the service."""

    @property
    def num_unacked(self) -> int:
        return self._session.num_unacked

    async def send(self, message: Message) -> None:
        """Say a message. Raises what the link raises; the message is kept and said again."""
        self._session.say(message)
        self._settled.clear()
        await self._send_unsent()

    async def receive(self, deadline_s: float) -> Message:
        """The service's next message. Raises DeadlineExceeded, TransportClosed, ProtocolError;
        GivenUp when the service misses what was dropped here long ago."""
        ends_s = self._clock() + deadline_s
        while True:
            left_s = ends_s - self._clock()
            try:
                message = await self._link.receive(max(0.0, min(left_s, PROBE_S)))
            except DeadlineExceeded as error:
                if left_s <= PROBE_S:
                    raise DeadlineExceeded(error.whom, error.what, deadline_s) from None
                await self._probe()
                continue
            self.last_heard_s = self._clock()
            if await self._is_news(message):
                return message

    async def settle(self, deadline_s: float) -> None:
        """Wait until everything said was heard; another task must be receiving. Raises
        DeadlineExceeded."""
        if not self._session.num_unacked:
            return
        try:
            await asyncio.wait_for(self._settled.wait(), deadline_s)
        except TimeoutError:
            raise DeadlineExceeded(
                "the buffer service", f"{self.num_unacked} messages to be heard", deadline_s
            ) from None

    async def close(self) -> None:
        """Let the service know what was heard, then close."""
        if self._session.ack_pending:
            with suppress(SpeedAsyncError):
                await self._answer()
        await self._link.close()

    async def _is_news(self, message: Message) -> bool:
        arrival = self._session.arrived(message)
        if not self._session.num_unacked:
            self._settled.set()
        match message:
            case Ack():
                return False
            case Nack(heard=heard):
                if not self._session.rewind(heard):
                    raise GivenUp(
                        f"the buffer service has lost what was said to it after message {heard}"
                    )
                await self._send_unsent()
                return False
            case Ping(sent=sent):
                await (self._ask() if sent > self._session.heard else self._answer())
                return False
            case _:
                pass
        if arrival is Receipt.GAP:
            await self._ask()
        return arrival in (Receipt.NEW, Receipt.OUTSIDE)

    async def _send_unsent(self) -> None:
        async with self._sending:
            while self._session.has_unsent:
                message = self._session.next_unsent()
                await self._link.send(message)
                if message.number == self._session.queued + 1:  # else rewound, or heard, meanwhile
                    self._session.queued_one()

    async def _probe(self) -> None:
        if self._session.has_unsent:
            await self._send_unsent()
        elif self._session.num_unacked:
            await self._link.send(self._session.probe())
        else:  # a service that was restarted can tell nothing to a peer that is silent
            await self._answer()

    async def _answer(self) -> None:
        await self._link.send(self._session.word())

    async def _ask(self) -> None:
        heard, asked_s = self._asked
        now_s = self._clock()
        if heard == self._session.heard and now_s - asked_s < ASK_AGAIN_S:
            return
        self._asked = (self._session.heard, now_s)
        await self._link.send(Nack(heard=self._session.heard))
