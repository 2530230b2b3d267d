"""Who takes part in the run: actors, the learner, and the epochs of the weight group."""

from dataclasses import dataclass, field

from speed_async.wire.messages import Hello, OfferWeights, PublishWeights


@dataclass(slots=True)
class ActorState:
    name: str
    index: int
    incarnation: int
    last_heard_s: float
    want: int = 0
    """Leases the actor can take now."""
    applied_version: int = 0
    said_goodbye: bool = False
    gauges: dict[str, float] = field(default_factory=dict)


class Membership:
    """Pure bookkeeping: who is here, and which of them share the present weight group."""

    def __init__(self) -> None:
        self.actors: dict[str, ActorState] = {}
        self.lost: set[str] = set()
        """Names given up for dead; such an incarnation may not come back."""
        self.learner: str | None = None
        self.epoch = 0
        self.members: tuple[str, ...] = ()
        self._group_broken = False

    def join(self, name: str, hello: Hello, now_s: float) -> list[ActorState]:
        """Add an actor; returns older incarnations of the same rank, which are thereby dead."""
        replaced = [
            state
            for state in self.actors.values()
            if state.index == hello.index and not state.said_goodbye
        ]
        self.actors[name] = ActorState(
            name=name, index=hello.index, incarnation=hello.incarnation, last_heard_s=now_s
        )
        return replaced

    def lose(self, name: str) -> None:
        del self.actors[name]
        self.lost.add(name)

    def present(self) -> list[ActorState]:
        """Actors that take work and weights, by rank."""
        here = [state for state in self.actors.values() if not state.said_goodbye]
        return sorted(here, key=lambda state: state.index)

    def silent(self, now_s: float, timeout_s: float) -> list[ActorState]:
        return [state for state in self.present() if now_s - state.last_heard_s > timeout_s]

    def form_group(self, publish: PublishWeights) -> list[tuple[str, OfferWeights]]:
        """Offers of the next broadcast, in rank order; a changed list of members, or a broken
        group, opens a new epoch."""
        names = tuple(state.name for state in self.present())
        if names != self.members or self._group_broken:
            self.epoch += 1
            self.members = names
            self._group_broken = False
        return [
            (
                name,
                OfferWeights(
                    policy_version=publish.policy_version,
                    epoch=self.epoch,
                    rank=rank,
                    world_size=len(names) + 1,
                    store_host=publish.store_host,
                    store_port=publish.store_port,
                    backend=publish.backend,
                    deadline_s=publish.deadline_s,
                ),
            )
            for rank, name in enumerate(names, start=1)
        ]

    def break_group(self) -> None:
        """The last broadcast failed: its process group must not be used again."""
        self._group_broken = True
