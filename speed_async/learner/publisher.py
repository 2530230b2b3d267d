"""Broadcasting a version to the actors that lack it, whatever becomes of some of them.

consumes   weight members (from the service)
waits for  the members (stall deadline and grace: the service may be waiting for room on its disk),
           each stage of a transfer (weights deadline)
goes on    without a member that is missing or refuses: the service gives it up, its supervisor
           starts another, and that one is sent a snapshot when it comes
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from speed_async.config.schema import WeightsConfig
from speed_async.errors import WeightSyncError
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.canary import Canary
from speed_async.weight_sync.channel import NamedTensor, WeightSender

UNEXPLAINED_ATTEMPTS = 3
"""Failed broadcasts of one version for which nobody is to blame, after which the run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    error: str
    missing: list[str]
    """Names of the actors to blame."""


class Published(Protocol):
    """What is published of the trainer."""

    def weights(self) -> Iterable[NamedTensor]: ...
    def canary(self) -> Canary: ...


class Publisher:
    def __init__(
        self,
        config: WeightsConfig,
        *,
        link: Link,
        inbox: Inbox,
        updates: Published,
        sender: WeightSender,
        backend: WeightBackend,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline_s = config.deadline_s
        self._patience_s = patience_s + SERVICE_GRACE_S
        self._link = link
        self._inbox = inbox
        self._updates = updates
        self._sender = sender
        self._backend: WeightBackend = backend
        self._clock = clock

    async def publish(self, policy_version: int) -> None:
        """Broadcast to every actor that lacks this version; nobody lacking it costs nothing.

        Each failed attempt loses the actors to blame, so one that hangs costs one deadline.
        Raises WeightSyncError when attempts go on failing and nobody is to blame.
        """
        num_unexplained = 0
        # Before the actors are asked: they stop sampling as soon as they are.
        canary = await asyncio.to_thread(self._updates.canary)
        while (failed := await self._broadcast(policy_version, canary)) is not None:
            num_unexplained += not failed.missing
            if num_unexplained == UNEXPLAINED_ATTEMPTS:
                raise WeightSyncError(
                    f"version {policy_version} could not be broadcast in {num_unexplained} attempts"
                    f" with nobody to blame; the last failed with: {failed.error}"
                )

    async def _broadcast(self, policy_version: int, canary: Canary) -> Failed | None:
        """One attempt, told to the service however it ends."""
        host, port = self._sender.store_address
        await self._link.send(
            m.PublishWeights(
                policy_version=policy_version,
                store_host=host,
                store_port=port,
                backend=self._backend,
                deadline_s=self._deadline_s,
            )
        )
        what = "the members of the weight group"
        members = await self._inbox.expect(m.WeightMembers, self._patience_s, what)
        self._inbox.forget(m.MembershipChanged)  # said before: these are members now
        began_s, num_bytes, failed = self._clock(), 0, None
        if members.actor_names:
            offer = WeightOffer(
                policy_version=policy_version,
                epoch=members.epoch,
                rank=0,
                world_size=members.world_size,
                store_host=host,
                store_port=port,
                backend=self._backend,
                deadline_s=self._deadline_s,
            )
            try:
                report = await asyncio.to_thread(
                    self._sender.send, offer, self._updates.weights(), canary
                )
                num_bytes = report.num_bytes
            except WeightSyncError as failure:
                failed = _blame(failure, members)
        await self._link.send(
            m.WeightsPublished(
                policy_version=policy_version,
                epoch=members.epoch,
                transfer_s=self._clock() - began_s,
                num_bytes=num_bytes,
                error=failed.error if failed else "",
                missing=failed.missing if failed else [],
            )
        )
        return failed


def _blame(failure: WeightSyncError, members: m.WeightMembers) -> Failed:
    """Ranks become names: a reader knows actors, and an actor may hold several ranks."""
    name_of_rank = dict(enumerate(_names_by_rank(members), start=1))
    missing = dict.fromkeys(name_of_rank[rank] for rank in failure.missing_ranks)
    ranks = ", ".join(f"rank {rank} is {name}" for rank, name in name_of_rank.items())
    return Failed(error=f"{failure} ({ranks})", missing=[*missing])


def _names_by_rank(members: m.WeightMembers) -> list[str]:
    names_and_ranks = zip(members.actor_names, members.ranks_each, strict=True)
    return [name for name, num_ranks in names_and_ranks for _ in range(num_ranks)]
