"""Service and conversations as one deterministic machine: inputs in, numbered messages out.

The same inputs always lead to the same state. So the journal needs to hold inputs only, and a
service that died is had again by taking them in once more.
"""

from dataclasses import replace

from speed_async.buffer.durability.journal import Journal, Place, Record
from speed_async.buffer.service import BufferService
from speed_async.buffer.sessions import Sessions
from speed_async.observability.metrics import Event
from speed_async.transport import messages as m
from speed_async.transport.codec import decode, encode


class StateMachine:
    CONFIGURED = ("journal", "events")

    def __init__(self, service: BufferService, journal: Journal | None = None) -> None:
        self.service = service
        self.conversations = Sessions()
        self.journal = journal
        """Written before anything is done; None keeps none."""
        self.events: list[Event] = []
        self.needs_sync = False
        """Something is to be sent that promises a durable journal."""
        self.last_s = 0.0
        """Time of the last input."""

    # --- inputs: recorded, then taken in -------------------------------------------------------

    def message(self, peer: str, message: m.Message, now_s: float, key: str = "") -> None:
        """What a peer said, whose connection has this public key. Control messages and repetitions
        are dealt with and not recorded."""
        if not self.conversations.admit(peer, message, now_s):
            self._note_refusal(peer, now_s)
            return
        answer = self.service.at_once(peer, message, key)
        if answer is not None:
            self.conversations.replies.append((peer, answer))
            return
        place = None
        if self.journal is not None:
            frames = encode(_to_record(message))
            place = self.journal.append("message", now_s, peer=peer, text=key, frames=frames)
        self._message(peer, message, now_s, place, key)

    def tick(self, now_s: float, loop_lag_s: float) -> None:
        if self.journal is not None:
            self.journal.append("tick", now_s, value=loop_lag_s)
        self._tick(now_s, loop_lag_s)

    def gone(self, peer: str, now_s: float) -> None:
        """A peer has no connection now."""
        state = self.service.membership.actors.get(peer)
        if state is None or state.gone_since_s is not None:
            self.conversations.drop_unnumbered(peer)
            return
        if self.journal is not None:
            self.journal.append("gone", now_s, peer=peer)
        self._gone(peer, now_s)

    def refused(self, peer: str, reason: str, now_s: float) -> None:
        """This peer was turned away before its message could be taken in: nobody listens to it any
        more, and if it is an actor, it is lost."""
        if peer not in self.service.membership.actors:
            return
        if self.journal is not None:
            self.journal.append("refused", now_s, peer=peer, text=reason)
        self._refused(peer, reason, now_s)

    def begin_attempt(self, life: int, now_s: float) -> None:
        if self.journal is not None:
            self.journal.append("life", now_s, value=float(life))
        self._begin_life(life, now_s)

    def replay(self, place: Place, record: Record) -> None:
        """Take in once more what was recorded; what the machine says to it was said."""
        match record.kind:
            case "message":
                message = decode(record.frames)
                sequence = record.sequence
                self._message(record.peer, message, record.now_s, place, record.text, sequence)
            case "tick":
                self._tick(record.now_s, record.value)
            case "gone":
                self._gone(record.peer, record.now_s)
            case "refused":
                self._refused(record.peer, record.text, record.now_s)
            case "life":
                self._begin_life(int(record.value), record.now_s)
            case _:
                return
        self.events.clear()

    def _note_refusal(self, peer: str, now_s: float) -> None:
        """The conversations may just have turned this peer away for good."""
        replies = self.conversations.replies
        if not replies or replies[-1][0] != peer:
            return
        answer = replies[-1][1]
        if isinstance(answer, m.Rejected):
            self.service.validator.refused(peer)
            self.refused(peer, answer.reason, now_s)

    # --- what they do ----------------------------------------------------------------------------

    def _message(
        self,
        peer: str,
        message: m.Message,
        now_s: float,
        place: Place | None,
        key: str,
        sequence: int = 0,
    ) -> None:
        self.conversations.took_in(peer, message)
        service = self.service
        service.place = place
        service.sequence = self.journal.sequence if self.journal is not None else sequence
        service.handle(peer, message, now_s, key)
        self._after(now_s)

    def _tick(self, now_s: float, loop_lag_s: float) -> None:
        self.service.tick(now_s, loop_lag_s)
        self._after(now_s)

    def _gone(self, peer: str, now_s: float) -> None:
        self.service.gone(peer, now_s)
        self.conversations.drop_unnumbered(peer)
        self._after(now_s)

    def _refused(self, peer: str, reason: str, now_s: float) -> None:
        self.service.refused(peer, reason, now_s)
        self._after(now_s)

    def _begin_life(self, life: int, now_s: float) -> None:
        self.service.begin_attempt(life, now_s)
        self.service.outbox.clear()
        self.conversations.forget_all()
        self._after(now_s)

    def _after(self, now_s: float) -> None:
        self.last_s = now_s
        service = self.service
        for peer in service.given_up:
            self.conversations.give_up(peer)
        service.given_up.clear()
        for peer in service.forgotten:
            self.conversations.forget(peer)
        service.forgotten.clear()
        if service.outbox:
            for peer, message in service.outbox:
                self.needs_sync = self.needs_sync or isinstance(message, m.JournalDurable)
                self.conversations.say(peer, message)
            service.outbox.clear()
        if service.events:
            self.events += service.events
            service.events.clear()


def _to_record(message: m.Message) -> m.Message:
    """A sample without its texts: nothing follows from them."""
    if isinstance(message, m.Sample):
        return replace(message, prompt="", completion="", extracted="")
    return message
