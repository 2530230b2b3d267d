"""Members of the run: the learner, the actors started as ranks, and the actors that joined."""

from dataclasses import dataclass, field

from speed_async.config.checks.combinations import INCARNATIONS_PER_ATTEMPT
from speed_async.config.sections.cluster import ClusterConfig
from speed_async.transport.messages import Hello

RECONNECT_S = 10.0
"""A connection that was closed is restored well within this time; that of a dead actor is not."""
SILENT_LINK_S = 5.0
"""The connection of an actor that ends is closed within moments of its last message. Silence that
is longer than this comes before when the network fails or the actor hangs: then the actor may
return, and only the peer timeout decides."""
JOIN_TIMEOUT_S = 60.0
"""A join expires if its actor does not send Hello within this time. An actor that sends it later,
because its engine starts slowly, is still admitted."""


@dataclass(kw_only=True, slots=True)
class PendingJoin:
    """A supervisor that joined and whose actor has not sent Hello."""

    index: int
    key: str
    requested_s: float


@dataclass(kw_only=True, slots=True)
class ActorState:
    name: str
    index: int
    incarnation: int
    last_message_s: float
    disconnected_since_s: float | None = None
    """When the loss of its connection was detected; None once it sends a message again."""
    weight_ranks: int = 1
    """Number of consecutive ranks of the weight group that its engine uses."""
    want: int = 0
    """Number of leases that the actor requests."""
    applied_version: int = 0
    sent_version: int = 0
    """Newest version that was sent to it completely; it may still be applying it."""
    awaits_weights: bool = False
    """It joined after training began and has not applied a trained version yet."""
    leaving: bool = False
    """It is shutting down and receives no more leases or weight offers."""
    departed: bool = False
    """It sent Goodbye."""
    gauges: dict[str, int | float] = field(default_factory=dict)
    progress_s: float = 0.0
    """When it last reported more tokens than before."""


@dataclass(kw_only=True, slots=True)
class MembershipState:
    actors: dict[str, ActorState] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    """Lost actors by name, with the reason. A lost incarnation cannot return."""
    learner: str | None = None
    last_index: int = 0
    """The highest index ever used by a rank, in any attempt, or assigned to a supervisor. Indices
    are never reused."""
    pending: dict[str, PendingJoin] = field(default_factory=dict)
    """By supervisor."""
    admitted: dict[str, int] = field(default_factory=dict)
    """Index by supervisor whose actor sent Hello."""
    joined: set[int] = field(default_factory=set)
    """Indices of actors that joined."""
    expected: set[int] = field(default_factory=set)
    """Joined actors that are present or may return."""
    keys: dict[int, str] = field(default_factory=dict)
    """Public key by index."""


class Membership:
    """Present and expected members. Pure state, no I/O."""

    def __init__(self, config: ClusterConfig, state: MembershipState) -> None:
        self._num_configured = config.actors
        self._first_free_index = config.learners + config.actors
        self._state = state
        self._present: tuple[ActorState, ...] | None = None  # cache of present()

    @property
    def actors(self) -> dict[str, ActorState]:
        return self._state.actors

    @property
    def lost(self) -> dict[str, str]:
        return self._state.lost

    @property
    def learner(self) -> str | None:
        """Name of the connected learner."""
        return self._state.learner

    def join(
        self, name: str, hello: Hello, now_s: float, policy_version: int, *, key: str = ""
    ) -> list[ActorState]:
        """Add an actor. Returns the older incarnations that it replaces."""
        replaced = [
            state
            for state in self.actors.values()
            if state.index == hello.index and not state.departed
        ]
        self._present = None
        self.actors[name] = ActorState(
            name=name,
            index=hello.index,
            incarnation=hello.incarnation,
            last_message_s=now_s,
            weight_ranks=hello.weight_ranks,
            awaits_weights=policy_version > 0,
        )
        self._state.keys[hello.index] = key
        if not self._is_free(hello.index):
            self._state.last_index = max(self._state.last_index, hello.index)
        elif hello.index <= self._state.last_index:
            self._state.joined.add(hello.index)
            self._state.expected.add(hello.index)
            self._complete_join(hello.index)
        return replaced

    def _complete_join(self, index: int) -> None:
        for supervisor, pending in self._state.pending.items():
            if pending.index == index:
                self._state.admitted[supervisor] = index
                del self._state.pending[supervisor]
                return

    def lose(self, name: str, reason: str) -> None:
        del self.actors[name]
        self._present = None
        self.lost[name] = reason

    def leave(self, state: ActorState) -> None:
        """The actor sent Goodbye."""
        state.departed = True
        self._present = None
        self._state.expected.discard(state.index)

    def present(self) -> tuple[ActorState, ...]:
        """Actors that have not sent Goodbye, by index."""
        if self._present is None:
            present = [state for state in self.actors.values() if not state.departed]
            self._present = tuple(sorted(present, key=lambda state: state.index))
        return self._present

    def extend_timeouts(self, seconds: float) -> None:
        """Exclude a period in which the service did not receive from all peer timeouts."""
        for state in self.present():
            state.last_message_s += seconds
            if state.disconnected_since_s is not None:
                state.disconnected_since_s += seconds

    def restart_timeouts(self, now_s: float) -> None:
        """Begin all peer timeouts anew: the service was restarted and has received nothing yet."""
        for state in self.present():
            state.last_message_s = now_s
            if state.disconnected_since_s is not None:
                state.disconnected_since_s = now_s

    def timed_out(self, now_s: float, timeout_s: float) -> list[ActorState]:
        """Actors without a message for this long, or RECONNECT_S after they closed their
        connection."""
        return [
            state
            for state in self.present()
            if now_s - state.last_message_s > timeout_s
            or (
                state.disconnected_since_s is not None
                and state.disconnected_since_s - state.last_message_s <= SILENT_LINK_S
                and now_s - state.disconnected_since_s > RECONNECT_S
            )
        ]

    def has_joined(self, supervisor: str) -> bool:
        """Whether this supervisor has an index."""
        return supervisor in self._state.admitted or supervisor in self._state.pending

    def is_rank(self, role: str) -> bool:
        """Whether this is the learner or an actor that torchrun started."""
        kind, _, index = role.partition("-")
        is_actor = kind == "actor" and index.isdecimal() and len(index) < 10
        return role == "learner" or (is_actor and int(index) < self._first_free_index)

    @property
    def num_known(self) -> int:
        """Number of names that are stored, including those of peers that left."""
        return (
            len(self.actors) + len(self.lost) + len(self._state.admitted) + len(self._state.pending)
        )

    def key_of(self, index: int) -> str | None:
        """The public key required of the actor with this index; None for any key."""
        return self._state.keys.get(index)

    def learner_joined(self, name: str) -> None:
        self._state.learner = name

    def begin_attempt(self) -> None:
        """All processes are restarted, ranks possibly on hosts with other keys."""
        self._state.learner = None
        self._state.keys = {i: key for i, key in self._state.keys.items() if self._is_free(i)}

    # --- actors that join --------------------------------------------------------------------

    @property
    def num_expected(self) -> int:
        """Number of actors when none is missing."""
        return self._num_configured + sum(map(self._is_free, self._state.expected))

    def num_pending(self, key: str | None = None) -> int:
        """Number of pending joins, of one key or of all."""
        if key is None:
            return len(self._state.pending)
        return sum(pending.key == key for pending in self._state.pending.values())

    def admit(self, supervisor: str, key: str, now_s: float) -> int:
        """The index of this supervisor's actor; assigns one on the first call."""
        if (index := self.index_of(supervisor)) is not None:
            return index
        index = max(self._first_free_index, self._state.last_index + 1)
        while index in self._state.keys:  # in use by an actor that chose its index itself
            index += 1
        self._state.last_index = index
        self._state.pending[supervisor] = PendingJoin(index=index, key=key, requested_s=now_s)
        self._state.keys[index] = key
        return index

    def index_of(self, supervisor: str) -> int | None:
        """The index of this supervisor's actor; None if it has none."""
        pending = self._state.pending.get(supervisor)
        return pending.index if pending is not None else self._state.admitted.get(supervisor)

    def expire_joins(self, now_s: float) -> list[str]:
        """Remove the pending joins older than JOIN_TIMEOUT_S; returns their supervisors."""
        expired = [
            name
            for name, pending in self._state.pending.items()
            if now_s - pending.requested_s > JOIN_TIMEOUT_S
        ]
        for name in expired:
            self._remove_join(name)
        return expired

    def _remove_join(self, supervisor: str) -> None:
        index = self._state.pending.pop(supervisor).index
        if self._is_free(index):  # otherwise a rank uses it now
            self._state.keys.pop(index, None)

    def next_incarnation(self, index: int, attempt: int) -> int:
        """The first incarnation of an actor whose supervisor starts in this attempt."""
        known = [state.incarnation for state in self.actors.values() if state.index == index]
        for name in self.lost:
            actor, _, number = name.partition(".")
            if actor == f"actor-{index}" and number.isdecimal():
                known.append(int(number))
        first = attempt * INCARNATIONS_PER_ATTEMPT
        in_attempt = [number for number in known if number // INCARNATIONS_PER_ATTEMPT == attempt]
        return max([first, *(number + 1 for number in in_attempt)])

    def index_conflict(self, hello: Hello) -> str | None:
        """Why an actor cannot use its index: a later incarnation uses it, or a rank does, because
        this attempt of the run has more ranks. None if it can."""
        if hello.role != "actor":
            return None
        index = hello.index
        joined = hello.incarnation < INCARNATIONS_PER_ATTEMPT and (
            index in self._state.joined
            or any(pending.index == index for pending in self._state.pending.values())
        )
        if joined and not self._is_free(index):
            return (
                f"the run was resumed with more ranks, and actor-{index} is one of them now: join "
                "again to get another index"
            )
        present = [state for state in self.present() if state.index == index]
        if any(state.incarnation > hello.incarnation for state in present):
            return f"a later incarnation of actor-{index} is running"
        return None

    def withdraw(self, supervisor: str) -> list[ActorState] | None:
        """The actor of this supervisor will not return. Returns its present states; None for an
        unknown supervisor."""
        if supervisor in self._state.pending:
            self._remove_join(supervisor)
            return []
        index = self._state.admitted.get(supervisor)
        if index is None:
            return None
        self._state.expected.discard(index)
        if not self._is_free(index):  # a rank uses the index
            return []
        return [state for state in self.present() if state.index == index]

    def _is_free(self, index: int) -> bool:
        """Whether no rank uses this index."""
        return index >= self._first_free_index
