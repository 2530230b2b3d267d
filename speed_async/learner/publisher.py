"""Broadcasts a policy version to the actors that lack it, and tolerates failed members.

consumes   weight members (from the service)
waits for  the members (stall deadline plus grace: the service may be waiting for disk space),
           each stage of a transfer (weights deadline)
continues  without a member that is missing, lost or rejects the transfer: the service removes it,
           its supervisor starts a new incarnation, and that one receives a snapshot when it joins
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from speed_async.config.sections.weights import WeightsConfig
from speed_async.errors import DeadlineExceeded, WeightSyncError
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import WeightSender

WHAT = "the members of the weight group"
MAX_UNEXPLAINED_FAILURES = 3
"""Failed broadcasts of one version without a known faulty member, after which the run fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BroadcastFailure:
    error: str
    missing: list[str]
    """Names of the faulty actors."""


class Publisher:
    def __init__(
        self,
        config: WeightsConfig,
        *,
        link: Link,
        inbox: Inbox,
        trainer: Trainer,
        sender: WeightSender,
        backend: WeightBackend,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline_s = config.deadline_s
        self._timeout_s = timeout_s + SERVICE_GRACE_S
        self._link = link
        self._inbox = inbox
        self._trainer = trainer
        self._sender = sender
        self._backend: WeightBackend = backend
        self._clock = clock

    async def publish(self, policy_version: int) -> None:
        """Broadcasts this version to every actor that lacks it; a no-op when there is none.

        Each failed broadcast removes the faulty actors, so an actor that hangs costs one deadline.
        Raises WeightSyncError after repeated failures without a known faulty actor.
        """
        num_unexplained = 0
        # Computed before the members are requested, because actors then stop sampling.
        canary = await asyncio.to_thread(self._trainer.canary)
        while (failed := await self._broadcast(policy_version, canary)) is not None:
            num_unexplained += not failed.missing
            if num_unexplained == MAX_UNEXPLAINED_FAILURES:
                raise WeightSyncError(
                    f"version {policy_version} could not be broadcast in {num_unexplained} attempts"
                    f" without a known faulty actor; the last error was: {failed.error}"
                )

    async def _broadcast(self, policy_version: int, canary: Canary) -> BroadcastFailure | None:
        """One broadcast, whose outcome is reported to the service."""
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
        members = await self._inbox.expect(m.WeightMembers, self._timeout_s, WHAT)
        self._inbox.discard(m.MembershipChanged)  # superseded by the members
        started_s, num_bytes, failed = self._clock(), 0, None
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
            lost: set[int] = set()
            watching = asyncio.create_task(self._watch(members, lost), name="watch members")
            try:
                report = await asyncio.to_thread(
                    self._sender.send,
                    offer,
                    self._trainer.weights(),
                    canary,
                    lost,
                    self._trainer.whole,
                )
                num_bytes = report.num_bytes
            except WeightSyncError as failure:
                failed = _describe_failure(failure, members)
            finally:
                watching.cancel()
                await asyncio.wait((watching,))
            if not watching.cancelled():
                watching.result()  # raises what the service reported meanwhile
        await self._link.send(
            m.WeightsPublished(
                policy_version=policy_version,
                epoch=members.epoch,
                transfer_s=self._clock() - started_s,
                num_bytes=num_bytes,
                error=failed.error if failed else "",
                missing=failed.missing if failed else [],
            )
        )
        return failed

    async def _watch(self, members: m.WeightMembers, lost: set[int]) -> None:
        """Adds the ranks of members that the service declares lost, until cancelled."""
        ranks = list(enumerate(_names_by_rank(members), start=1))
        changes: list[m.MembershipChanged] = []
        try:
            while True:
                with suppress(DeadlineExceeded):  # the stages of the transfer have deadlines
                    changes.append(
                        await self._inbox.expect(m.MembershipChanged, self._timeout_s, WHAT)
                    )
                    lost |= {rank for rank, name in ranks if name in changes[-1].lost}
        finally:
            self._inbox.defer(changes)  # an actor that joined meanwhile still lacks the version


def _describe_failure(failure: WeightSyncError, members: m.WeightMembers) -> BroadcastFailure:
    """Replaces ranks with actor names; an actor may have several ranks."""
    name_of_rank = dict(enumerate(_names_by_rank(members), start=1))
    missing = dict.fromkeys(name_of_rank[rank] for rank in failure.missing_ranks)
    ranks = ", ".join(f"rank {rank} is {name}" for rank, name in name_of_rank.items())
    return BroadcastFailure(error=f"{failure} ({ranks})", missing=[*missing])


def _names_by_rank(members: m.WeightMembers) -> list[str]:
    names_and_ranks = zip(members.actor_names, members.ranks_each, strict=True)
    return [name for name, num_ranks in names_and_ranks for _ in range(num_ranks)]
