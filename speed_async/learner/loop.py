"""The learner's loop: take a batch, update, broadcast, until done or told to stop.

consumes   batches and weight members (from the service)
waits for  a batch (stall deadline), the broadcast (weights deadline), the last summary
unblocked by  the service; a stop request takes effect between two steps
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError, WeightSyncError
from speed_async.learner.trainer import UpdateResult
from speed_async.types import Group, WeightBackend, WeightOffer
from speed_async.weights.channel import NamedTensor, WeightSender
from speed_async.wire import messages as m
from speed_async.wire.groups import unpack_group
from speed_async.wire.transport import Link

BROADCAST_ATTEMPTS = 3
SERVICE_GRACE_S = 10.0
"""How much longer than the service's own deadlines the learner waits for the service."""

M = TypeVar("M", bound=m.Message)


class Updates(Protocol):
    """What the loop asks of the trainer."""

    def update(self, groups: list[Group]) -> UpdateResult: ...
    def weights(self) -> Iterable[NamedTensor]: ...
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
        self._sender = sender
        self._backend: WeightBackend = backend
        self._stop = stop
        self._clock = clock
        self._version = 0
        self._groups_trained = 0
        self._completions_trained = 0
        self._tokens_trained = 0
        self._skipped = 0
        self._reached: m.TargetReached | None = None
        self._set_aside: deque[m.Message] = deque()

    async def run(self, hello: m.Hello) -> Finished:
        """Train until `run.updates` or a stop; raises what ends the run badly."""
        await self._link.send(hello)
        await self._expect(m.Welcome, self._config.cluster.connect_timeout_s, "its welcome")
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
            message = await self._next_or_stop(patience_s)
            if message is None:
                return None
            if isinstance(message, m.BatchGroup):
                groups.append(unpack_group(message))
            elif isinstance(message, m.BatchReady):
                return _whole(groups, message)
            elif isinstance(message, m.MembershipChanged):
                await self._publish()
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
        await self._publish()
        sync_s = self._clock() - began_s
        every = self._config.learner.checkpoint_every
        if every and self._version % every == 0 and self._version < self._config.run.updates:
            await asyncio.to_thread(self._updates.save, self._version)
        return sync_s

    # --- weights -----------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Broadcast the present version to whoever is there; a failed group is built anew."""
        error = ""
        for _ in range(BROADCAST_ATTEMPTS):
            error = await self._broadcast_once()
            if not error:
                return
        raise WeightSyncError(
            f"version {self._version} could not be broadcast in {BROADCAST_ATTEMPTS} attempts; "
            f"the last failed with: {error}"
        )

    async def _broadcast_once(self) -> str:
        """Returns the error's text, or nothing when all went well."""
        host, port = self._sender.store_address
        deadline_s = self._config.weights.deadline_s
        await self._link.send(
            m.PublishWeights(
                policy_version=self._version,
                store_host=host,
                store_port=port,
                backend=self._backend,
                deadline_s=deadline_s,
            )
        )
        members = await self._expect(m.WeightMembers, deadline_s, "the members of the weight group")
        began_s, num_bytes, error = self._clock(), 0, ""
        if members.actor_names:
            offer = WeightOffer(
                policy_version=self._version,
                epoch=members.epoch,
                rank=0,
                world_size=len(members.actor_names) + 1,
                store_host=host,
                store_port=port,
                backend=self._backend,
                deadline_s=deadline_s,
            )
            try:
                report = await asyncio.to_thread(self._sender.send, offer, self._updates.weights())
                num_bytes = report.num_bytes
            except WeightSyncError as failure:
                error = f"{failure} (members by rank: {', '.join(members.actor_names)})"
        await self._link.send(
            m.WeightsPublished(
                policy_version=self._version,
                epoch=members.epoch,
                transfer_s=self._clock() - began_s,
                num_bytes=num_bytes,
                error=error,
            )
        )
        return error

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
            message = await self._next(left_s)
            if isinstance(message, m.Summary):
                return message
            if isinstance(message, m.MembershipChanged) and evaluate:
                await self._publish()
        raise DeadlineExceeded("the buffer service", "the run's summary", patience_s)

    # --- in ----------------------------------------------------------------------------------

    async def _next(self, deadline_s: float) -> m.Message:
        """Next message, first those that came while another was expected."""
        if self._set_aside:
            return self._set_aside.popleft()
        return await self._receive(deadline_s)

    async def _receive(self, deadline_s: float) -> m.Message:
        """Another role's failure is raised here."""
        message = await self._link.receive(deadline_s)
        if isinstance(message, m.Abort):
            raise RoleError(message.role, message.message)
        if isinstance(message, m.Rejected):
            raise RoleError("buffer service", f"refused a message of the learner: {message.reason}")
        return message

    async def _next_or_stop(self, deadline_s: float) -> m.Message | None:
        """Next message, or None when a stop is asked for first."""
        receiving = asyncio.create_task(self._next(deadline_s), name="receive")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if receiving.done():
            return await receiving
        receiving.cancel()
        await asyncio.wait((receiving,))
        return None

    async def _expect(self, kind: type[M], deadline_s: float, what: str) -> M:
        """The next message of this kind; whatever else comes on the way is kept for later."""
        ends_s = self._clock() + deadline_s
        while True:
            left_s = ends_s - self._clock()
            if left_s <= 0:
                raise DeadlineExceeded("the buffer service", what, deadline_s)
            message = await self._receive(left_s)
            if isinstance(message, kind):
                return message
            self._set_aside.append(message)


def _whole(groups: list[Group], ready: m.BatchReady) -> list[Group]:
    """The batch, when every group that was announced has come."""
    missing = set(ready.lease_ids) - {group.lease_id for group in groups}
    if missing:
        raise RoleError("buffer service", f"announced groups {sorted(missing)} that never came")
    return groups
