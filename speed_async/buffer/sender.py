"""Sends what the state machine emits: messages to the hub, events to the feed and the sinks."""

from collections.abc import Callable, Sequence

from speed_async.buffer.durability.encoding import StoredGroup
from speed_async.buffer.durability.journal import Place
from speed_async.buffer.sessions import Sealed
from speed_async.buffer.state_machine import StateMachine
from speed_async.errors import JournalError
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import Sink
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.transport import Delivery, Hub

KEPT_KINDS = ("step", "evaluation", "suite", "sample", "end")
"""Event kinds that the sinks store. Status events go to the metrics feed only."""
FULL_RETRY_LIMIT_S = 1.0
"""How long a full peer queue is retried at short intervals; then only each step retries."""


class Sender:
    def __init__(
        self,
        machine: StateMachine,
        hub: Hub,
        feed: FeedPublisher,
        sinks: Sequence[Sink],
        now: Callable[[], float],
    ) -> None:
        self._machine = machine
        self._hub = hub
        self._feed = feed
        self._sinks = sinks
        self._now = now
        self._unsent: dict[str, float] = {}  # peers with unsent messages, and since when

    @property
    def retries_soon(self) -> bool:
        """Whether the queue of a peer has become full recently."""
        now_s = self._now()
        return any(now_s - since_s < FULL_RETRY_LIMIT_S for since_s in self._unsent.values())

    def send_effects(self, sealed: Sealed, senders: set[str]) -> None:
        """Send the sealed messages as far as the queues have space, and acknowledge `senders`."""
        sessions = self._machine.sessions
        sessions.release(sealed)
        for peer, reply in sealed.replies:
            self._hub.offer(peer, reply)
        for peer in sealed.unsent:
            self._unsent.setdefault(peer, self._now())
        for peer in filter(sessions.has_unsent, senders):  # it may have been disconnected
            self._unsent.setdefault(peer, self._now())
        for peer in list(self._unsent):
            self._send_to(peer)
        for peer, ack in sessions.due_acks(senders):
            self._hub.offer(peer, ack)

    def _send_to(self, peer: str) -> None:
        sessions = self._machine.sessions
        while (message := sessions.next_unsent(peer)) is not None:
            delivery = self.offer(peer, self._load_group(message))
            if delivery is not Delivery.QUEUED:
                if delivery is Delivery.GONE:
                    del self._unsent[peer]
                return
            sessions.mark_queued(peer)
            self._unsent[peer] = self._now()
        self._unsent.pop(peer, None)

    def offer(self, peer: str, message: m.Message) -> Delivery:
        delivery = self._hub.offer(peer, message)
        if delivery is Delivery.GONE:
            self._machine.gone(peer, self._now())
        return delivery

    def _load_group(self, message: m.Message) -> m.Message:
        """Replace a StoredGroup by its GroupFinished, from memory or from the journal."""
        if not isinstance(message, StoredGroup):
            return message
        held = self._machine.service.lifecycle.groups.in_training.get(message.lease_id)
        group = held.message if held is not None else None
        if group is None:
            group = self._read(message.place)
        return group.numbered(message.number, message.received)

    def _read(self, place: Place) -> m.GroupFinished:
        """Read a group from the journal. Raises JournalError, with the remedy."""
        journal = self._machine.journal
        assert journal is not None
        try:
            group = decode(journal.read(place).frames)
        except JournalError as error:
            raise JournalError(
                f"a group of the next batch cannot be read: {error}. Move '{journal.folder}' "
                "away and resume: the run then continues from its last checkpoint, without the "
                "groups that were not trained yet"
            ) from error
        assert isinstance(group, m.GroupFinished)
        return group

    async def publish(self, events: list[Event]) -> None:
        for event in events:
            await self._feed.publish(event)
            self._store(event)

    def _store(self, event: Event) -> None:
        if event.kind not in KEPT_KINDS:
            return
        for sink in self._sinks:
            try:
                sink.write(event)
            except OSError as error:
                text = f"metrics could not be written: {error}"
                self._machine.service.warnings.open("metrics", text, transient=True)
