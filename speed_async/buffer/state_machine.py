"""Service and sessions as one deterministic state machine: inputs in, numbered messages out.

The same inputs always lead to the same state. The journal therefore records inputs only, and
replay rebuilds the state of a failed service.
"""

from dataclasses import dataclass, field, replace

from speed_async.buffer.durability.journal import Journal, Place, Record
from speed_async.buffer.handlers.effects import Results
from speed_async.buffer.service import BufferService
from speed_async.buffer.sessions import Sessions
from speed_async.buffer.state import MachineState
from speed_async.observability.metrics import Event
from speed_async.transport import messages as m
from speed_async.transport.codec import decode, encode


@dataclass(kw_only=True, slots=True)
class Output:
    """What inputs resulted in, apart from messages."""

    events: list[Event] = field(default_factory=list)
    needs_sync: bool = False
    """A message promises that the journal is durable."""
    snapshot_due: bool = False
    """A snapshot makes older records unnecessary."""


class StateMachine:
    def __init__(self, service: BufferService, state: MachineState | None = None) -> None:
        """`state` is the one that the service was built from; None for that of a new run."""
        self.service = service
        self.state = MachineState(service=service.state) if state is None else state
        assert self.state.service is service.state
        self.sessions = Sessions(self.state.sessions)
        self.journal: Journal | None = None
        """Each input is appended before it is processed; None disables the journal."""
        self._output = Output()

    @property
    def last_s(self) -> float:
        """Time of the last input."""
        return self.state.last_s

    # --- inputs: appended to the journal, then processed ---------------------------------------

    def message(self, peer: str, message: m.Message, now_s: float, key: str = "") -> None:
        """Process a message of a peer whose connection has this public key. Control messages and
        duplicates are handled without a record."""
        if not self.sessions.admit(peer, message, now_s):
            self._note_refusal(peer, now_s)
            return
        reply = self.service.reply_without_record(peer, message, key)
        if reply is not None:
            self.sessions.replies.append((peer, reply))
            return
        place, sequence = None, 0
        if self.journal is not None:
            frames = encode(_to_record(message))
            place = self.journal.append("message", now_s, peer=peer, text=key, frames=frames)
            sequence = self.journal.sequence
        self._message(peer, message, now_s, key, place, sequence)

    def tick(self, now_s: float, loop_lag_s: float) -> None:
        if self.journal is not None:
            self.journal.append("tick", now_s, value=loop_lag_s)
        self._tick(now_s, loop_lag_s)

    def gone(self, peer: str, now_s: float) -> None:
        """A peer lost its connection."""
        state = self.service.membership.actors.get(peer)
        if state is None or state.disconnected_since_s is not None:
            self.sessions.drop_unnumbered(peer)
            return
        if self.journal is not None:
            self.journal.append("gone", now_s, peer=peer)
        self._gone(peer, now_s)

    def refused(self, peer: str, reason: str, now_s: float) -> None:
        """A message of this peer was refused before processing. The peer is blocked, and an actor
        is declared lost."""
        if peer not in self.service.membership.actors:
            return
        if self.journal is not None:
            self.journal.append("refused", now_s, peer=peer, text=reason)
        self._refused(peer, reason, now_s)

    def begin_attempt(self, attempt: int, now_s: float) -> None:
        if self.journal is not None:
            self.journal.append("attempt", now_s, value=float(attempt))
        self._begin_attempt(attempt, now_s)

    def replay(self, place: Place, record: Record) -> list[Event]:
        """Process a recorded input again. Returns the events that a sink stores, apart from
        samples, whose texts are not recorded: the failed process may not have stored the last of
        them. The rest of the output was emitted before."""
        match record.kind:
            case "message":
                message = decode(record.frames)
                key, sequence = record.text, record.sequence
                self._message(record.peer, message, record.now_s, key, place, sequence)
            case "tick":
                self._tick(record.now_s, record.value)
            case "gone":
                self._gone(record.peer, record.now_s)
            case "refused":
                self._refused(record.peer, record.text, record.now_s)
            case "attempt":
                self._begin_attempt(int(record.value), record.now_s)
            case _:
                return []
        events = self.take_output().events
        return [event for event in events if event.kind not in ("status", "sample")]

    def take_output(self) -> Output:
        """What the inputs since the last call resulted in, apart from the messages, which the
        sessions keep."""
        output, self._output = self._output, Output()
        return output

    def _note_refusal(self, peer: str, now_s: float) -> None:
        """Handle the case that the session layer just rejected this peer."""
        replies = self.sessions.replies
        if not replies or replies[-1][0] != peer:
            return
        reply = replies[-1][1]
        if isinstance(reply, m.Rejected):
            self.service.validator.refused(peer)
            self.refused(peer, reply.reason, now_s)

    # --- transitions -----------------------------------------------------------------------------

    def _message(
        self,
        peer: str,
        message: m.Message,
        now_s: float,
        key: str,
        place: Place | None,
        sequence: int,
    ) -> None:
        self.sessions.record_received(peer, message)
        results = self.service.handle(peer, message, now_s, key, place=place, sequence=sequence)
        self._after(now_s, results)

    def _tick(self, now_s: float, loop_lag_s: float) -> None:
        self._after(now_s, self.service.tick(now_s, loop_lag_s))

    def _gone(self, peer: str, now_s: float) -> None:
        self.service.gone(peer, now_s)
        self.sessions.drop_unnumbered(peer)
        self.state.last_s = now_s

    def _refused(self, peer: str, reason: str, now_s: float) -> None:
        self._after(now_s, self.service.refused(peer, reason, now_s))

    def _begin_attempt(self, attempt: int, now_s: float) -> None:
        results = self.service.begin_attempt(attempt)
        self.sessions.clear()
        self._after(now_s, results)

    def _after(self, now_s: float, results: Results) -> None:
        self.state.last_s = now_s
        for peer in results.lost_peers:
            self.sessions.discard_unacked(peer)
        for peer in results.expired_joins:
            self.sessions.remove(peer)
        output = self._output
        for peer, message in results.messages:
            output.needs_sync = output.needs_sync or isinstance(message, m.JournalDurable)
            self.sessions.enqueue(peer, message)
        output.events += results.events
        output.snapshot_due = output.snapshot_due or results.snapshot_due


def _to_record(message: m.Message) -> m.Message:
    """Strip the texts of a sample: the state does not depend on them."""
    if isinstance(message, m.Sample):
        return replace(message, prompt="", completion="", extracted="")
    return message
