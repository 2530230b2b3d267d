"""The learner's loop: take a batch, update, broadcast, until done or told to stop.

consumes   batches and news of actors that need weights (from the service)
waits for  a batch (stall deadline), the broadcast (publishing.py), the last summary
unblocked by  the service; a stop request takes effect between two steps
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.learner.publishing import Publisher
from speed_async.learner.trainer import UpdateResult
from speed_async.types import Group, WeightBackend
from speed_async.weights.canary import Canary
from speed_async.weights.channel import NamedTensor, WeightSender
from speed_async.wire import messages as m
from speed_async.wire.groups import unpack_group
from speed_async.wire.transport import Link


class Updates(Protocol):
    """What the loop asks of the trainer."""

    def update(self, groups: list[Group]) -> UpdateResult: ...
    def weights(self) -> Iterable[NamedTensor]: ...
    def canary(self) -> Canary: ...
    def save(self, policy_version: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How the run ended."""

    reason: str
    completed: bool
    policy_version: int
    optimizer_updates: int
    completions_trained: int
    tokens_trained: int
    skipped_updates: int
    save_error: str
    """Why the last checkpoint is missing; empty when it is there."""
    service_fields: dict[str, object]


class LearnerLoop:
    def __init__(
        self,
        config: Config,
        *,
        link: Link,
        updates: Updates,
        sender: WeightSender,
        backend: WeightBackend,
        stop: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._link = link
        self._updates = updates
        self._stop = stop
        self._clock = clock
        self._inbox = Inbox(link, clock)
        self._publisher = Publisher(
            config.weights,
            link=link,
            inbox=self._inbox,
            updates=updates,
            sender=sender,
            backend=backend,
            clock=clock,
        )
        self._version = 0
        self._groups_trained = 0
        self._completions_trained = 0
        self._tokens_trained = 0
        self._skipped = 0
        self._reached: m.TargetReached | None = None

    async def run(self, hello: m.Hello) -> Finished:
        """Train until `run.updates` or a stop; raises what ends the run badly."""
        await self._link.send(hello)
        await self._inbox.expect(m.Welcome, self._config.cluster.connect_timeout_s, "its welcome")
        wait_s = sync_s = 0.0
        while self._version < self._config.run.updates and not self._stop.is_set():
            began_s = self._clock()
            groups = await self._take_batch()
            if groups is None:
                break
            wait_s = self._clock() - began_s
            sync_s = await self._update(groups, wait_s, sync_s)
        return await self._finish()

    async def _take_batch(self) -> list[Group] | None:
        """The next batch; None when a stop came first."""
        take = m.TakeBatch(
            policy_version=self._version, num_groups=self._config.learner.groups_per_update
        )
        await self._link.send(take)
        # The service speaks first when no batch comes: it knows why.
        patience_s = self._config.cluster.stall_timeout_s + SERVICE_GRACE_S
        groups: list[Group] = []
        while True:
            message = await self._inbox.next_or_stop(self._stop, patience_s)
            if message is None:
                return None
            if isinstance(message, m.BatchGroup):
                groups.append(unpack_group(message))
            elif isinstance(message, m.BatchReady):
                return _whole(groups, message)
            elif isinstance(message, m.MembershipChanged):
                await self._publisher.publish(self._version)
            elif isinstance(message, m.TargetReached):
                self._reached = message
                return None

    async def _update(self, groups: list[Group], wait_s: float, last_sync_s: float) -> float:
        """One optimiser update and its broadcast; returns the seconds the broadcast took."""
        result = await asyncio.to_thread(self._updates.update, groups)
        self._version += 1
        if result.skipped:
            self._skipped += 1
        else:
            self._groups_trained += len(groups)
            self._completions_trained += result.completions
            self._tokens_trained += result.tokens
        metrics = dict(result.metrics)
        metrics |= {
            "time/wait_s": wait_s,
            "time/train_s": result.train_s,
            "time/sync_s": last_sync_s,
            "completions_per_update": float(result.completions),
            "completions_trained": float(self._completions_trained),
        }
        await self._link.send(
            m.Trained(
                policy_version=self._version,
                lease_ids=[group.lease_id for group in groups],
                skipped=result.skipped,
                groups_trained=self._groups_trained,
                completions_trained=self._completions_trained,
                tokens_trained=self._tokens_trained,
                metrics=metrics,
            )
        )
        began_s = self._clock()
        await self._publisher.publish(self._version)
        sync_s = self._clock() - began_s
        every = self._config.learner.checkpoint_every
        if every and self._version % every == 0 and self._version < self._config.run.updates:
            await asyncio.to_thread(self._updates.save, self._version)
        return sync_s

    # --- the end -----------------------------------------------------------------------------

    async def _finish(self) -> Finished:
        evaluate = self._version >= self._config.run.updates
        completed = evaluate or self._reached is not None
        reason = "completed" if completed else "stopped by a signal"
        if not evaluate and (reached := self._reached) is not None:
            reason = f"accuracy {reached.accuracy:.3f} reached at version {reached.policy_version}"
        await self._link.send(
            m.FinishRun(policy_version=self._version, evaluate=evaluate, reason=reason)
        )
        saving = asyncio.create_task(
            asyncio.to_thread(self._updates.save, self._version), name="save"
        )
        summary = await self._await_summary(evaluate=evaluate)
        save_error = ""
        try:
            await saving
        except OSError as error:  # the run's results are still to be written
            save_error = f"the last checkpoint could not be saved: {error}"
        return Finished(
            reason=reason,
            completed=completed,
            policy_version=self._version,
            optimizer_updates=self._version - self._skipped,
            completions_trained=self._completions_trained,
            tokens_trained=self._tokens_trained,
            skipped_updates=self._skipped,
            save_error=save_error,
            service_fields=summary.fields,
        )

    async def _await_summary(self, *, evaluate: bool) -> m.Summary:
        """The last evaluation may need weights for an actor that joined late."""
        cluster = self._config.cluster
        patience_s = cluster.drain_timeout_s + SERVICE_GRACE_S
        if evaluate:
            patience_s += cluster.stall_timeout_s
        ends_s = self._clock() + patience_s
        while (left_s := ends_s - self._clock()) > 0:
            message = await self._inbox.next(left_s)
            if isinstance(message, m.Summary):
                return message
            if isinstance(message, m.MembershipChanged) and evaluate:
                await self._publisher.publish(self._version)
        raise DeadlineExceeded("the buffer service", "the run's summary", patience_s)


def _whole(groups: list[Group], ready: m.BatchReady) -> list[Group]:
    """The batch, when every group that was announced has come."""
    missing = set(ready.lease_ids) - {group.lease_id for group in groups}
    if missing:
        raise RoleError("buffer service", f"announced groups {sorted(missing)} that never came")
    return groups
