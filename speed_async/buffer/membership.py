"""Who takes part in the run: actors, the learner, and actors that came by themselves."""

from dataclasses import dataclass, field

from speed_async.config.checks import INCARNATIONS_A_LIFE
from speed_async.config.schema import ClusterConfig
from speed_async.transport.messages import Hello

RECONNECT_S = 10.0
"""Connections that are cut come back well within this; a dead actor's does not."""
JOIN_KEPT_S = 60.0
"""A join whose actor has not said Hello by then is forgotten. An actor that says it later, because
its engine starts slowly, is taken in all the same."""


@dataclass(kw_only=True, slots=True)
class Joined:
    """What is known of a supervisor that joined."""

    index: int
    key: str
    asked_s: float


@dataclass(slots=True)
class ActorState:
    name: str
    index: int
    incarnation: int
    last_heard_s: float
    gone_since_s: float | None = None
    """When its connection was first found to be gone, unless it was heard since."""
    weight_ranks: int = 1
    """Consecutive ranks of the weight group its engine takes."""
    want: int = 0
    """Leases the actor can take now."""
    applied_version: int = 0
    sent_version: int = 0
    """Newest version of which all bytes went out to it; it may still be loading them."""
    awaits_weights: bool = False
    """It came when training had begun, and has nothing fit to sample with yet."""
    leaving: bool = False
    """It was told to stop: no more leases and offers."""
    said_goodbye: bool = False
    gauges: dict[str, float] = field(default_factory=dict)


class Membership:
    """Pure bookkeeping of who is here, and who is to be."""

    CONFIGURED = ("_num_configured", "_first_free_index", "_present")

    def __init__(self, config: ClusterConfig) -> None:
        self.actors: dict[str, ActorState] = {}
        self.lost: dict[str, str] = {}
        """Names given up for dead, and why; such an incarnation may not come back."""
        self.learner: str | None = None
        self._num_configured = config.actors
        self._first_free_index = config.learners + config.actors
        self._last_index = 0
        """The highest index that a rank ever had, also in lives with more of them than now, or that
        was ever given to a supervisor: none is given twice."""
        self._awaited: dict[str, Joined] = {}  # by supervisor, whose actor has not said Hello
        self._admitted: dict[str, int] = {}  # index by supervisor, whose actor has
        self._came: set[int] = set()  # indices of actors that came by themselves
        self._expected: set[int] = set()  # of those, who is here or may come back
        self._keys: dict[int, str] = {}  # to which key an index belongs
        self._present: tuple[ActorState, ...] | None = None  # until somebody comes or goes

    def join(
        self, name: str, hello: Hello, now_s: float, policy_version: int, *, key: str = ""
    ) -> list[ActorState]:
        """Add an actor; returns older incarnations of the same rank, which are thereby dead."""
        replaced = [
            state
            for state in self.actors.values()
            if state.index == hello.index and not state.said_goodbye
        ]
        self._present = None
        self.actors[name] = ActorState(
            name=name,
            index=hello.index,
            incarnation=hello.incarnation,
            last_heard_s=now_s,
            weight_ranks=hello.weight_ranks,
            awaits_weights=policy_version > 0,
        )
        self._keys[hello.index] = key
        if not self._is_free(hello.index):
            self._last_index = max(self._last_index, hello.index)
        elif hello.index <= self._last_index:
            self._came.add(hello.index)
            self._expected.add(hello.index)
            self._followed(hello.index)
        return replaced

    def _followed(self, index: int) -> None:
        """The actor of a join is here."""
        for supervisor, joined in self._awaited.items():
            if joined.index == index:
                self._admitted[supervisor] = index
                del self._awaited[supervisor]
                return

    def lose(self, name: str, reason: str) -> None:
        del self.actors[name]
        self._present = None
        self.lost[name] = reason

    def leave(self, state: ActorState) -> None:
        """The actor said goodbye."""
        state.said_goodbye = True
        self._present = None
        self._expected.discard(state.index)

    def present(self) -> tuple[ActorState, ...]:
        """Actors that have not said goodbye, by rank."""
        if self._present is None:
            here = [state for state in self.actors.values() if not state.said_goodbye]
            self._present = tuple(sorted(here, key=lambda state: state.index))
        return self._present

    def not_listened(self, seconds: float) -> None:
        """For so long nobody could be heard: that is nobody's silence."""
        for state in self.present():
            state.last_heard_s += seconds
            if state.gone_since_s is not None:
                state.gone_since_s += seconds

    def silent(self, now_s: float, timeout_s: float) -> list[ActorState]:
        """Not heard for this long, or without a connection for RECONNECT_S."""
        return [
            state
            for state in self.present()
            if now_s - state.last_heard_s > timeout_s
            or (state.gone_since_s is not None and now_s - state.gone_since_s > RECONNECT_S)
        ]

    def admitted(self, supervisor: str) -> bool:
        """Whether an actor of this supervisor was let in."""
        return supervisor in self._admitted or supervisor in self._awaited

    def is_rank(self, role: str) -> bool:
        """Whether this is the learner, or an actor that torchrun started."""
        kind, _, index = role.partition("-")
        is_actor = kind == "actor" and index.isdecimal() and len(index) < 10
        return role == "learner" or (is_actor and int(index) < self._first_free_index)

    @property
    def num_known(self) -> int:
        """Names of which something is kept, those that left included."""
        return len(self.actors) + len(self.lost) + len(self._admitted) + len(self._awaited)

    def belongs_to(self, index: int) -> str | None:
        """The key that the actor of this index has to have; None for any."""
        return self._keys.get(index)

    def begin_attempt(self) -> None:
        """Ranks are started again, perhaps on hosts with other keys."""
        self._keys = {i: key for i, key in self._keys.items() if self._is_free(i)}

    # --- actors that come by themselves ------------------------------------------------------

    @property
    def num_wanted(self) -> int:
        """Actors the run would have if none were missing."""
        return self._num_configured + sum(map(self._is_free, self._expected))

    def num_awaited(self, key: str | None = None) -> int:
        """Supervisors, of this key or of all, that joined and whose actor has not said Hello."""
        if key is None:
            return len(self._awaited)
        return sum(joined.key == key for joined in self._awaited.values())

    def admit(self, supervisor: str, key: str, now_s: float) -> int:
        """The index of this supervisor's actor: a new one, or the one it has."""
        if (index := self.index_of(supervisor)) is not None:
            return index
        index = max(self._first_free_index, self._last_index + 1)
        while index in self._keys:  # of an actor that named it without being given it
            index += 1
        self._last_index = index
        self._awaited[supervisor] = Joined(index=index, key=key, asked_s=now_s)
        self._keys[index] = key
        return index

    def index_of(self, supervisor: str) -> int | None:
        """The index of this supervisor's actor."""
        joined = self._awaited.get(supervisor)
        return joined.index if joined is not None else self._admitted.get(supervisor)

    def forget_joins(self, now_s: float) -> list[str]:
        """Forget the joins that nothing followed; returns their supervisors."""
        late = [name for name, j in self._awaited.items() if now_s - j.asked_s > JOIN_KEPT_S]
        for name in late:
            self._forget_join(name)
        return late

    def _forget_join(self, supervisor: str) -> None:
        index = self._awaited.pop(supervisor).index
        if self._is_free(index):  # else a rank has it now
            self._keys.pop(index, None)

    def next_incarnation(self, index: int, life: int) -> int:
        """The first of an actor whose supervisor begins in this life of the run."""
        known = [state.incarnation for state in self.actors.values() if state.index == index]
        for name in self.lost:
            actor, _, number = name.partition(".")
            if actor == f"actor-{index}" and number.isdecimal():
                known.append(int(number))
        first = life * INCARNATIONS_A_LIFE
        of_this_life = [number for number in known if number // INCARNATIONS_A_LIFE == life]
        return max([first, *(number + 1 for number in of_this_life)])

    def displaced(self, hello: Hello) -> str | None:
        """Why an actor cannot have the index that it names: a later incarnation has it, or in this
        life of the run, which has more ranks, one of them has it."""
        if hello.role != "actor":
            return None
        index = hello.index
        came_by_itself = hello.incarnation < INCARNATIONS_A_LIFE and (
            index in self._came or any(joined.index == index for joined in self._awaited.values())
        )
        if came_by_itself and not self._is_free(index):
            return (
                f"the run goes on with more ranks, one of which is actor-{index} now: join again "
                "to be given another index"
            )
        here = [state for state in self.present() if state.index == index]
        if any(state.incarnation > hello.incarnation for state in here):
            return f"a later incarnation of actor-{index} is here"
        return None

    def withdraw(self, supervisor: str) -> list[ActorState] | None:
        """Its actor will not come back. Returns what is here of it; None for no such supervisor."""
        if supervisor in self._awaited:
            self._forget_join(supervisor)
            return []
        index = self._admitted.get(supervisor)
        if index is None:
            return None
        self._expected.discard(index)
        if not self._is_free(index):  # a rank has its place
            return []
        return [state for state in self.present() if state.index == index]

    def _is_free(self, index: int) -> bool:
        """Whether no rank has this index."""
        return index >= self._first_free_index
