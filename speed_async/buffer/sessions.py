"""The service's sessions: one per peer, consistent with the state of the service.

A peer that numbers its first message 1 has a session. A peer that sends unnumbered messages gets
unnumbered replies, which are sent once.

During a journal write, the next messages are processed already. Their effects and their
acknowledgements must wait until they are in the journal too. With `holding`, they stay here until
the `Sealed` that covers them is released.
"""

from dataclasses import dataclass, field

from speed_async.buffer.durability.encoding import SavedMessage
from speed_async.transport import messages as m
from speed_async.transport.session import Ack, Nack, Ping, Receipt, Session

PING_INTERVAL_S = 1.0
DECLARED_LOST = "this incarnation was declared lost: start a new one"
MESSAGES_LOST = "the service lost messages that it had sent to this peer: start a new incarnation"
UNKNOWN_PEER = "the service does not know this peer: start a new incarnation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """Effects of a batch of inputs, to release when the inputs are in the journal."""

    marks: dict[str, tuple[int, int]]
    """By peer: number of the last message to it, and of the last message received from it."""
    once: list[tuple[str, m.Message]]
    """Messages to peers without a session."""
    replies: list[tuple[str, m.Message]]
    unsent: list[str]


@dataclass(kw_only=True, slots=True)
class SessionsState:
    sessions: dict[str, Session[SavedMessage]] = field(default_factory=dict)
    once: dict[str, list[SavedMessage]] = field(default_factory=dict)
    """Unsent messages to peers without a session."""


class Sessions:
    def __init__(self, state: SessionsState) -> None:
        self.holding = False
        """Whether messages and acknowledgements wait for their release."""
        self._held: set[str] = set()
        self._held_once: list[tuple[str, m.Message]] = []
        self.replies: list[tuple[str, m.Message]] = []
        """Unnumbered control messages for the server to send; dropped if the queue is full."""
        self.unsent: list[str] = []
        """Peers with messages enqueued since the last seal."""
        self._sessions = state.sessions
        self._once = state.once
        self._nack_s: dict[str, float] = {}  # time of the last Nack by peer
        self._ping_s: dict[str, float] = {}  # time of the last Ping by peer

    def admit(self, peer: str, message: m.Message, now_s: float) -> bool:
        """Whether this message is new and for the service. Handles all other messages."""
        session = self._sessions.get(peer)
        if session is None:
            return self._admit_stranger(peer, message)
        if message.received > session.sent:  # acknowledges messages lost with the journal's tail
            self.replies.append((peer, m.Rejected(reason=MESSAGES_LOST)))
            return False
        if isinstance(message, Nack):
            if session.rewind(message.received):
                self.unsent.append(peer)
            else:
                self.replies.append((peer, m.Rejected(reason=DECLARED_LOST)))
            return False
        if isinstance(message, Ping):
            lacks = message.sent > session.received
            self.replies.append(
                (peer, Nack(received=session.received) if lacks else session.make_ack())
            )
            session.arrived(message)
            return False
        if message.number == session.received + 1:
            return True
        receipt = session.arrived(message)
        if receipt is Receipt.DUPLICATE:
            self.replies.append((peer, session.make_ack()))
        elif receipt is Receipt.GAP:
            self._send_nack(peer, session, now_s)
        return receipt is Receipt.UNNUMBERED and not isinstance(message, Ack)

    def _admit_stranger(self, peer: str, message: m.Message) -> bool:
        if isinstance(message, Ack | Nack):
            return False
        if message.number <= 1 and not isinstance(message, Ping):
            return True
        self.replies.append((peer, m.Rejected(reason=UNKNOWN_PEER)))
        return False

    def record_received(self, peer: str, message: m.Message) -> None:
        """Mark an admitted message as processed, so that it is acknowledged."""
        if message.number == 1 and peer not in self._sessions:
            self._sessions[peer] = Session()
        if session := self._sessions.get(peer):
            self._hold(peer, session)
            session.arrived(message)

    def record_ack(self, peer: str, message: m.Message) -> None:
        """Record only the acknowledgement of a message that is not processed."""
        if session := self._sessions.get(peer):
            session.forget(message.received)

    def enqueue(self, peer: str, message: m.Message) -> None:
        """Queue a message for the server to send, and keep it until it is acknowledged."""
        if session := self._sessions.get(peer):
            self._hold(peer, session)
            session.enqueue(message)
        elif self.holding:
            self._held_once.append((peer, message))
        else:
            self._once.setdefault(peer, []).append(message)
        self.unsent.append(peer)

    def seal(self) -> Sealed:
        """Everything held since the last seal."""
        peers, self._held = self._held, set()
        once, self._held_once = self._held_once, []
        replies, self.replies = self.replies, []
        unsent, self.unsent = self.unsent, []
        held = ((peer, self._sessions.get(peer)) for peer in peers)
        marks = {peer: (session.sent, session.received) for peer, session in held if session}
        return Sealed(marks=marks, once=once, replies=replies, unsent=unsent)

    def release(self, sealed: Sealed) -> None:
        """Make sealed effects available for sending. Seals are released in order."""
        for peer, upto in sealed.marks.items():
            if session := self._sessions.get(peer):
                session.release(upto)
        for peer, message in sealed.once:
            self._once.setdefault(peer, []).append(message)

    def _hold(self, peer: str, session: Session) -> None:
        if self.holding:
            self._held.add(peer)
            session.hold()

    def next_unsent(self, peer: str) -> m.Message | None:
        session = self._sessions.get(peer)
        if session is None:
            waiting = self._once.get(peer)
            return waiting[0] if waiting else None
        return session.next_unsent() if session.has_unsent else None

    def has_unsent(self, peer: str) -> bool:
        session = self._sessions.get(peer)
        return session.has_unsent if session else peer in self._once

    def mark_queued(self, peer: str) -> None:
        if session := self._sessions.get(peer):
            session.mark_queued()
        elif waiting := self._once.get(peer):
            waiting.pop(0)
            if not waiting:
                del self._once[peer]

    def drop_unnumbered(self, peer: str) -> None:
        """Drop the queued messages of a disconnected peer without a session."""
        self._once.pop(peer, None)

    def due_acks(self, peers: set[str]) -> list[tuple[str, Ack]]:
        """Acks for those of `peers` with a pending one that no other message carries."""
        sessions = ((peer, self._sessions.get(peer)) for peer in peers)
        return [
            (peer, s.make_ack()) for peer, s in sessions if s and s.ack_pending and not s.has_unsent
        ]

    def due_pings(self, now_s: float) -> list[tuple[str, Ping]]:
        """Pings for peers with messages unacknowledged for PING_INTERVAL_S."""
        due = []
        for peer, session in self._sessions.items():
            if not session.num_unacked:
                self._ping_s.pop(peer, None)
            elif session.has_unsent:
                self.unsent.append(peer)
            elif now_s - self._ping_s.setdefault(peer, now_s) >= PING_INTERVAL_S:
                self._ping_s[peer] = now_s
                due.append((peer, session.probe()))
        return due

    def num_unacked(self, peer: str) -> int:
        session = self._sessions.get(peer)
        return session.num_unacked if session else len(self._once.get(peer, ()))

    def discard_unacked(self, peer: str) -> None:
        """Discard the unacknowledged messages of a peer that does not return."""
        if session := self._sessions.get(peer):
            session.discard_all()
        self._once.pop(peer, None)

    def remove(self, peer: str) -> None:
        """Remove all state of a peer, after its join expired."""
        for table in (self._sessions, self._once, self._nack_s, self._ping_s):
            table.pop(peer, None)

    def clear(self) -> None:
        """Remove all sessions: no peer of the previous attempt returns."""
        self._sessions.clear()
        self._once.clear()
        self._ping_s.clear()
        self._nack_s.clear()
        self.unsent.clear()

    def rewind_all(self) -> None:
        """Resend all unacknowledged messages: after a restart it is unknown which were sent."""
        for session in self._sessions.values():
            session.requeue_unacked()
        self.unsent = [*self._sessions, *self._once]

    def _send_nack(self, peer: str, session: Session, now_s: float) -> None:
        if now_s - self._nack_s.get(peer, -1.0) >= 0.5:
            self._nack_s[peer] = now_s
            self.replies.append((peer, Nack(received=session.received)))
