"""The service's conversations: one session a peer, in step with the service's own state.

A peer that numbers its first message 1 holds a session; one that numbers nothing is answered
unnumbered and once.

While the journal is written, the next messages are taken in already. What they lead to, and that
they came, may not be told before they lie in the journal, too: with `holding` all of it stays here,
until what was sealed is released.
"""

from dataclasses import dataclass

from speed_async.transport import messages as m
from speed_async.transport.session import Ack, Nack, Ping, Receipt, Session

PROBE_S = 1.0
GIVEN_UP = "this incarnation was given up as lost: start a new one"
FORGOTTEN = "the service has lost a part of what it told this peer: start a new incarnation"
UNKNOWN = "the service does not know this peer: start a new incarnation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """What some inputs led to, that may be told when they lie in the journal."""

    told: dict[str, tuple[int, int]]
    """By peer: number of the last message that is said to it, and of the last heard of it."""
    once: list[tuple[str, m.Message]]
    """To peers that hold no session."""
    replies: list[tuple[str, m.Message]]
    unsent: list[str]


class Sessions:
    CONFIGURED = ("replies", "unsent", "holding", "_held", "_held_once", "_asked_s", "_probed_s")

    def __init__(self) -> None:
        self.holding = False
        """Nothing may be told that was not released."""
        self._held: set[str] = set()
        self._held_once: list[tuple[str, m.Message]] = []
        self.replies: list[tuple[str, m.Message]] = []
        """Control messages for the shell to send, unnumbered and if they can be sent at once."""
        self.unsent: list[str] = []
        """Peers that were told something since this was last emptied."""
        self._sessions: dict[str, Session] = {}
        self._once: dict[str, list[m.Message]] = {}
        self._asked_s: dict[str, float] = {}
        self._probed_s: dict[str, float] = {}

    def admit(self, peer: str, message: m.Message, now_s: float) -> bool:
        """Whether this message is for the service, and new. What is not is dealt with here."""
        session = self._sessions.get(peer)
        if session is None:
            return self._admit_stranger(peer, message)
        if message.heard > session.sent:  # it heard what went with the journal's tail
            self.replies.append((peer, m.Rejected(reason=FORGOTTEN)))
            return False
        if isinstance(message, Nack):
            if session.rewind(message.heard):
                self.unsent.append(peer)
            else:
                self.replies.append((peer, m.Rejected(reason=GIVEN_UP)))
            return False
        if isinstance(message, Ping):
            lacks = message.sent > session.heard
            self.replies.append((peer, Nack(heard=session.heard) if lacks else session.word()))
            session.arrived(message)
            return False
        if message.number == session.heard + 1:
            return True
        arrival = session.arrived(message)
        if arrival is Receipt.AGAIN:
            self.replies.append((peer, session.word()))
        elif arrival is Receipt.GAP:
            self._ask(peer, session, now_s)
        return arrival is Receipt.OUTSIDE and not isinstance(message, Ack)

    def _admit_stranger(self, peer: str, message: m.Message) -> bool:
        if isinstance(message, Ack | Nack):
            return False
        if message.number <= 1 and not isinstance(message, Ping):
            return True
        self.replies.append((peer, m.Rejected(reason=UNKNOWN)))
        return False

    def took_in(self, peer: str, message: m.Message) -> None:
        """An admitted message is part of the state now."""
        if message.number == 1 and peer not in self._sessions:
            self._sessions[peer] = Session()
        if session := self._sessions.get(peer):
            self._hold(peer, session)
            session.arrived(message)

    def overheard(self, peer: str, message: m.Message) -> None:
        """Note what the peer has heard, of a message that is not taken in any more."""
        if session := self._sessions.get(peer):
            session.forget(message.heard)

    def say(self, peer: str, message: m.Message) -> None:
        """To be sent by the shell, and kept until it was heard."""
        if session := self._sessions.get(peer):
            self._hold(peer, session)
            session.say(message)
        elif self.holding:
            self._held_once.append((peer, message))
        else:
            self._once.setdefault(peer, []).append(message)
        self.unsent.append(peer)

    def seal(self) -> Sealed:
        """All that was held since the last seal."""
        peers, self._held = self._held, set()
        once, self._held_once = self._held_once, []
        replies, self.replies = self.replies, []
        unsent, self.unsent = self.unsent, []
        marks = ((peer, self._sessions.get(peer)) for peer in peers)
        told = {peer: (session.sent, session.heard) for peer, session in marks if session}
        return Sealed(told=told, once=once, replies=replies, unsent=unsent)

    def release(self, sealed: Sealed) -> None:
        """What was sealed may be told; seals are released in their order."""
        for peer, upto in sealed.told.items():
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

    def queued_one(self, peer: str) -> None:
        if session := self._sessions.get(peer):
            session.queued_one()
        elif waiting := self._once.get(peer):
            waiting.pop(0)
            if not waiting:
                del self._once[peer]

    def drop_unnumbered(self, peer: str) -> None:
        """What was to be said to a peer that holds no session and has no connection."""
        self._once.pop(peer, None)

    def words(self, peers: set[str]) -> list[tuple[str, Ack]]:
        """For those of `peers` that are owed one and will not be told otherwise."""
        sessions = ((peer, self._sessions.get(peer)) for peer in peers)
        return [
            (peer, s.word()) for peer, s in sessions if s and s.ack_pending and not s.has_unsent
        ]

    def probes(self, now_s: float) -> list[tuple[str, Ping]]:
        """For peers that have not heard all that was said to them for a while."""
        due = []
        for peer, session in self._sessions.items():
            if not session.num_unacked:
                self._probed_s.pop(peer, None)
            elif session.has_unsent:
                self.unsent.append(peer)
            elif now_s - self._probed_s.setdefault(peer, now_s) >= PROBE_S:
                self._probed_s[peer] = now_s
                due.append((peer, session.probe()))
        return due

    def num_unacked(self, peer: str) -> int:
        session = self._sessions.get(peer)
        return session.num_unacked if session else len(self._once.get(peer, ()))

    def give_up(self, peer: str) -> None:
        """This peer is gone for good: what it has not heard is not kept."""
        if session := self._sessions.get(peer):
            session.forget_all()
        self._once.pop(peer, None)

    def forget(self, peer: str) -> None:
        """Nothing was ever heard of this peer but its first message."""
        for kept in (self._sessions, self._once, self._asked_s, self._probed_s):
            kept.pop(peer, None)

    def forget_all(self) -> None:
        """A new life: no peer of the old one comes back."""
        self._sessions.clear()
        self._once.clear()
        self._probed_s.clear()
        self._asked_s.clear()
        self.unsent.clear()

    def rewind_all(self) -> None:
        """After a restart nobody knows what left the sockets: all that was not heard goes again."""
        for session in self._sessions.values():
            session.rewind_unacked()
        self.unsent = [*self._sessions, *self._once]

    def _ask(self, peer: str, session: Session, now_s: float) -> None:
        if now_s - self._asked_s.get(peer, -1.0) >= 0.5:
            self._asked_s[peer] = now_s
            self.replies.append((peer, Nack(heard=session.heard)))
