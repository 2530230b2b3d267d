"""The epochs of the weight group: the members of the next broadcast.

A broadcast goes to every actor that lacks its version. A new version goes to all actors. A version
that is published again goes only to the actors that joined since or missed it, in a separate
epoch; it does not involve the others. An actor that is still applying a version does not lack it.
"""

from speed_async.buffer.membership import ActorState, Membership
from speed_async.transport.messages import (
    OfferWeights,
    PublishWeights,
    WeightMembers,
    WeightsApplied,
    WeightsPublished,
)
from speed_async.types import WeightOffer


class WeightGroup:
    def __init__(self, membership: Membership) -> None:
        self.epoch = 0
        self.newest_version = 0
        """Newest version of which a broadcast has started."""
        self._membership = membership
        self._members: list[tuple[str, int]] = []  # name and number of ranks, in rank order
        self._broken = False
        self._invited: list[str] = []  # members of the broadcast in progress
        self._last_epochs: dict[str, int] = {}  # epoch of the last offer, by actor

    def form(self, publish: PublishWeights) -> tuple[list[tuple[str, OfferWeights]], WeightMembers]:
        """The offers to the actors, in rank order, and the reply to the learner. A change of
        members or a broken group opens a new epoch. A broadcast without members changes
        nothing."""
        self.newest_version = max(self.newest_version, publish.policy_version)
        lacking = [
            state
            for state in self._membership.present()
            if not state.leaving
            and max(state.applied_version, state.sent_version) < publish.policy_version
        ]
        members = [(state.name, state.weight_ranks) for state in lacking]
        if members and (self._broken or members != self._members):
            self.epoch += 1
            self._members, self._broken = members, False
        self._invited = [state.name for state in lacking]
        self._last_epochs |= dict.fromkeys(self._invited, self.epoch)
        ranks_each = [state.weight_ranks for state in lacking]
        answer = WeightMembers(
            policy_version=publish.policy_version,
            epoch=self.epoch,
            actor_names=list(self._invited),
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
        self._broken = True
        self._invited = []

    def published(self, message: WeightsPublished) -> list[ActorState]:
        """The broadcast ended. Returns the actors that made it fail."""
        actors = self._membership.actors
        invited, self._invited = self._invited, []
        if not message.error:
            for name in invited:
                if name in actors:
                    actors[name].sent_version = message.policy_version
            return []
        self._broken = True
        return [actors[name] for name in message.missing if name in actors]

    def applied(self, state: ActorState, message: WeightsApplied) -> bool:
        """An actor applied a version or failed to. Returns whether it must receive it again."""
        if not message.error:
            state.applied_version = message.policy_version
            state.awaits_weights = False
            return False
        if self._last_epochs.get(state.name) != message.epoch:
            return False  # outdated: the actor has a newer offer
        state.sent_version = state.applied_version
        if state.name in self._invited:
            self._invited.remove(state.name)
        self._broken = self._broken or message.epoch == self.epoch
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
