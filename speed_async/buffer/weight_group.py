"""The epochs of the weight group: the members of the next broadcast.

A broadcast goes to every actor that lacks its version. A new version goes to all actors. A version
that is published again goes only to the actors that joined since or missed it, in a separate
epoch; it does not involve the others. An actor that is still applying a version does not lack it.
"""

from dataclasses import dataclass, field

from speed_async.buffer.membership import ActorState, Membership
from speed_async.transport.messages import (
    MembershipChanged,
    OfferWeights,
    PublishWeights,
    WeightMembers,
    WeightsApplied,
    WeightsPublished,
)
from speed_async.types import WeightOffer


@dataclass(kw_only=True, slots=True)
class WeightGroupState:
    epoch: int = 0
    newest_version: int = 0
    """Newest version of which a broadcast has started."""
    members: list[tuple[str, int]] = field(default_factory=list)
    """Name and number of ranks, in rank order."""
    broken: bool = False
    invited: list[str] = field(default_factory=list)
    """Members of the broadcast in progress."""
    last_epochs: dict[str, int] = field(default_factory=dict)
    """Epoch of the last offer, by actor."""


class WeightGroup:
    def __init__(self, membership: Membership, state: WeightGroupState) -> None:
        self._membership = membership
        self._state = state

    @property
    def newest_version(self) -> int:
        """Newest version of which a broadcast has started."""
        return self._state.newest_version

    def form(self, publish: PublishWeights) -> tuple[list[tuple[str, OfferWeights]], WeightMembers]:
        """The offers to the actors, in rank order, and the reply to the learner. A change of
        members or a broken group opens a new epoch. A broadcast without members changes
        nothing."""
        self._state.newest_version = max(self._state.newest_version, publish.policy_version)
        lacking = [
            state
            for state in self._membership.present()
            if not state.leaving
            and max(state.applied_version, state.sent_version) < publish.policy_version
        ]
        members = [(state.name, state.weight_ranks) for state in lacking]
        if members and (self._state.broken or members != self._state.members):
            self._state.epoch += 1
            self._state.members, self._state.broken = members, False
        self._state.invited = [state.name for state in lacking]
        self._state.last_epochs |= dict.fromkeys(self._state.invited, self._state.epoch)
        ranks_each = [state.weight_ranks for state in lacking]
        answer = WeightMembers(
            policy_version=publish.policy_version,
            epoch=self._state.epoch,
            actor_names=list(self._state.invited),
            ranks_each=ranks_each,
            world_size=1 + sum(ranks_each),
        )
        first_ranks = [1 + sum(ranks_each[:position]) for position in range(len(lacking))]
        offers = [
            (state.name, _offer(publish, answer, rank))
            for state, rank in zip(lacking, first_ranks, strict=True)
        ]
        return offers, answer

    def reset(self) -> None:
        """The learner and all actors were restarted: the next broadcast opens a new epoch."""
        self._state.broken = True
        self._state.invited = []

    def lose(self, name: str) -> list[MembershipChanged]:
        """An actor is declared lost. Returns what the learner must know: the broadcast in progress
        waits for this member in vain."""
        if name not in self._state.invited:
            return []
        self._state.invited.remove(name)
        return [MembershipChanged(reason=f"{name} is lost", lost=[name])]

    def published(self, message: WeightsPublished) -> list[ActorState]:
        """The broadcast ended. Returns the actors that made it fail."""
        actors = self._membership.actors
        invited, self._state.invited = self._state.invited, []
        if not message.error:
            for name in invited:
                if name in actors:
                    actors[name].sent_version = message.policy_version
            return []
        self._state.broken = True
        return [actors[name] for name in message.missing if name in actors]

    def applied(self, state: ActorState, message: WeightsApplied) -> bool:
        """An actor applied a version or failed to. Returns whether it must receive it again."""
        if not message.error:
            state.applied_version = message.policy_version
            state.awaits_weights = False
            return False
        if self._state.last_epochs.get(state.name) != message.epoch:
            return False  # outdated: the actor has a newer offer
        state.sent_version = state.applied_version
        if state.name in self._state.invited:
            self._state.invited.remove(state.name)
        self._state.broken = self._state.broken or message.epoch == self._state.epoch
        return True


def _offer(publish: PublishWeights, members: WeightMembers, rank: int) -> OfferWeights:
    return OfferWeights(
        offer=WeightOffer(
            policy_version=publish.policy_version,
            epoch=members.epoch,
            rank=rank,
            world_size=members.world_size,
            store_host=publish.store_host,
            store_port=publish.store_port,
            backend=publish.backend,
            deadline_s=publish.deadline_s,
        )
    )
