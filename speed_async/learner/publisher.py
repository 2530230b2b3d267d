"""Broadcasts a policy version to the actors that lack it, and tolerates failed members.

consumes   weight members (from the service)
waits for  the members (stall deadline plus grace: the service may be waiting for disk space),
           each stage of a transfer (weights deadline)
beside     the learner, which meanwhile takes its next batch and computes the gradient of it
continues  without a member that is missing, lost or rejects the transfer: the service removes it,
           its supervisor starts a new incarnation, and that one receives a snapshot when it joins
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from speed_async.config.sections.weights import WeightsConfig
from speed_async.errors import WeightSyncError
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import WeightSender

WHAT = "the members of the weight group"
MAX_FURTHER_BROADCASTS = 3
"""Of one version, to actors that join meanwhile. Further ones wait for the next batch."""
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
        self._task: asyncio.Task[None] | None = None
        """The broadcast begun last."""
        self._names: list[str] = []
        """Of the members, by rank from 1."""
        self._lost: set[int] = set()
        """Ranks of members that the service has declared lost since it named the members."""
        inbox.observers.append(self._observe)

    async def publish(self, policy_version: int) -> None:
        """`begin`, then `wait`."""
        await self.begin(policy_version)
        await self.wait()

    async def begin(self, policy_version: int) -> None:
        """Begins to broadcast this version to every actor that lacks it, after the broadcast before
        it has ended. The weights must not change until `wait` returns."""
        await self.wait()
        # Computed before the members are requested, because actors then stop sampling.
        canary = await asyncio.to_thread(self._trainer.canary)
        await self._request_members(policy_version)
        self._task = asyncio.create_task(self._publish(policy_version, canary), name="publish")
        self._task.add_done_callback(self._report_error)

    async def wait(self) -> None:
        """Returns when the broadcast has ended.

        Raises WeightSyncError after repeated failures without a known faulty actor.
        """
        if self._task is not None:
            await asyncio.wait((self._task,))  # a cancelled waiter does not cancel the broadcast
            self._task.result()

    def wait_in_thread(self) -> None:
        """`wait`, in another thread than the event loop's."""
        if self._task is None:
            return
        if self._task.done():
            self._task.result()
        else:
            asyncio.run_coroutine_threadsafe(self.wait(), self._task.get_loop()).result()

    async def close(self) -> None:
        """Cancels the broadcast if there is one."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def _report_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._inbox.fail(error)

    async def _publish(self, policy_version: int, canary: Canary) -> None:
        """Each failed broadcast removes the faulty actors, so an actor that hangs costs one
        deadline. One that joins meanwhile gets a broadcast of its own."""
        num_unexplained, num_further = 0, 0
        while True:
            failed = await self._broadcast(policy_version, canary)
            if failed is None:
                may_go_on = num_further < MAX_FURTHER_BROADCASTS
                if not (may_go_on and self._inbox.take_received(m.MembershipChanged)):
                    return
                num_further += 1
            elif not failed.missing:
                num_unexplained += 1
                if num_unexplained == MAX_UNEXPLAINED_FAILURES:
                    raise WeightSyncError(
                        f"version {policy_version} could not be broadcast in {num_unexplained} "
                        "attempts without a known faulty actor; the last error was: "
                        f"{failed.error}"
                    )
            await self._request_members(policy_version)

    def _observe(self, message: m.Message) -> None:
        """Called in the order of arrival: a change that comes after the members is of them."""
        if isinstance(message, m.WeightMembers):
            self._names, self._lost = _names_by_rank(message), set()
            self._inbox.take_received(m.MembershipChanged)  # superseded by the members
        elif isinstance(message, m.MembershipChanged):
            ranks = enumerate(self._names, start=1)
            self._lost |= {rank for rank, name in ranks if name in message.lost}

    async def _request_members(self, policy_version: int) -> None:
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

    async def _broadcast(self, policy_version: int, canary: Canary) -> BroadcastFailure | None:
        """One broadcast to the requested members, whose outcome is reported to the service."""
        members = await self._inbox.expect(m.WeightMembers, self._timeout_s, WHAT)
        started_s, num_bytes, failed = self._clock(), 0, None
        if members.actor_names:
            host, port = self._sender.store_address
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
                    self._sender.send,
                    offer,
                    self._trainer.weights(),
                    canary,
                    self._lost,
                    self._trainer.whole,
                )
                num_bytes = report.num_bytes
            except WeightSyncError as failure:
                failed = _describe_failure(failure, members)
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


def _describe_failure(failure: WeightSyncError, members: m.WeightMembers) -> BroadcastFailure:
    """Replaces ranks with actor names; an actor may have several ranks."""
    name_of_rank = dict(enumerate(_names_by_rank(members), start=1))
    missing = dict.fromkeys(name_of_rank[rank] for rank in failure.missing_ranks)
    ranks = ", ".join(f"rank {rank} is {name}" for rank, name in name_of_rank.items())
    return BroadcastFailure(error=f"{failure} ({ranks})", missing=[*missing])


def _names_by_rank(members: m.WeightMembers) -> list[str]:
    names_and_ranks = zip(members.actor_names, members.ranks_each, strict=True)
    return [name for name, num_ranks in names_and_ranks for _ in range(num_ranks)]
