"""The learner's loop: take a batch, update, broadcast, until done or told to stop.

consumes   batches and news of actors that need weights (from the service)
waits for  a batch (stall deadline), the broadcast (publishing.py), the journal before a checkpoint,
           the last summary
unblocked by  the service; a stop request takes effect between two steps

A learner that was started again catches up first: the service stands at a version that the last
checkpoint has not come to, and hands out the batches of the missing updates again. Until their
weights are what actors hold already, nothing is published and no checkpoint is made.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError, SpeedAsyncError
from speed_async.learner.checkpoint.checkpointer import Checkpointer
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox, Stop
from speed_async.learner.progress import Progress, Restored
from speed_async.learner.publisher import Publisher
from speed_async.learner.trainer import UpdateResult
from speed_async.observability.summary import STOPPING
from speed_async.transport import messages as m
from speed_async.transport.groups import unpack_group
from speed_async.transport.transport import Link
from speed_async.types import Group, WeightBackend
from speed_async.weight_sync.canary import Canary
from speed_async.weight_sync.channel import NamedTensor, WeightSender


class Updates(Protocol):
    """What the loop asks of the trainer."""

    def update(self, groups: list[Group]) -> UpdateResult: ...
    def weights(self) -> Iterable[NamedTensor]: ...
    def canary(self) -> Canary: ...
    def save(self, progress: Progress) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How the run ended."""

    reason: str
    outcome: str
    """"completed", "stopped" or "nothing_learned" (observability/metrics.py)."""
    policy_version: int
    optimizer_updates: int
    completions_trained: int
    tokens_trained: int
    skipped_updates: int
    accuracy_reached: float | None
    """The held-out accuracy that ended the run (`run.stop_at_accuracy`), if one did."""
    save_error: str
    """Why the last checkpoint is missing; empty when it is there."""
    notices: tuple[str, ...]
    """What a person should know of, besides."""
    service_fields: dict[str, object]

    @property
    def completed(self) -> bool:
        return self.outcome == "completed"


class LearnerLoop:
    def __init__(
        self,
        config: Config,
        *,
        link: Link,
        updates: Updates,
        sender: WeightSender,
        backend: WeightBackend,
        stop: Stop,
        restored: Restored | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`restored`: the checkpoint that `updates` was brought back to; None starts anew."""
        self._config = config
        self._link = link
        self._updates = updates
        self._stop = stop
        self._clock = clock
        self._inbox = Inbox(link, clock, run_folder=config.run.folder)
        self._publisher = Publisher(
            config.weights,
            link=link,
            inbox=self._inbox,
            updates=updates,
            sender=sender,
            backend=backend,
            patience_s=config.cluster.stall_timeout_s,
            clock=clock,
        )
        self._restored = restored
        self._progress = restored.progress if restored else Progress()
        self._checkpointer = Checkpointer(
            link=link,
            inbox=self._inbox,
            updates=updates,
            patience_s=config.cluster.stall_timeout_s,
            saved_version=self._version if restored else None,
        )
        self._catch_up_version = 0
        """Where the service stands: versions below it are trained again, unpublished."""
        self._reached: m.TargetReached | None = None
        self._notices = list(restored.notices) if restored else []
        self._untold = ""
        """A notice that the service has not been told yet."""
        self._told_of_skipping = False

    @property
    def _version(self) -> int:
        return self._progress.policy_version

    @property
    def _is_catching_up(self) -> bool:
        return self._version < self._catch_up_version

    async def run(self, hello: m.Hello) -> Finished:
        """Train until `run.updates` or a stop; raises what ends the run badly."""
        await self._begin(hello)
        announcing = asyncio.create_task(self._announce_stop(), name="stop")
        try:
            sync_s: float | None = None
            while self._goes_on and not self._stop.is_set():
                began_s = self._clock()
                groups = await self._take_batch()
                if groups is None:
                    break
                sync_s = await self._update(groups, self._clock() - began_s, sync_s)
            return await self._finish()
        finally:
            announcing.cancel()

    async def _announce_stop(self) -> None:
        """An update may take minutes: whoever asked for a stop sees at once that it was heard."""
        await self._stop.wait()
        self._log(STOPPING)
        with contextlib.suppress(SpeedAsyncError):  # the run may have ended meanwhile
            await self._link.send(m.StopAsked())

    async def _begin(self, hello: m.Hello) -> None:
        """Say hello; where there is a version already, give it to the actors that wait for it."""
        await self._link.send(hello)
        patience_s = self._config.cluster.connect_timeout_s
        welcome = await self._inbox.expect(m.Welcome, patience_s, "its welcome")
        self._catch_up_version = welcome.policy_version
        if self._restored is not None or welcome.policy_version > 0:
            progress = self._progress
            await self._link.send(
                m.Resumed(
                    policy_version=progress.policy_version,
                    service_sequence=progress.service_sequence,
                    groups_trained=progress.groups_trained,
                    completions_trained=progress.completions_trained,
                    tokens_trained=progress.tokens_trained,
                    recent_lease_ids=progress.recent_lease_ids,
                    notice="; ".join(self._notices),
                )
            )
        if self._is_catching_up:
            self._log(
                f"going on from version {self._version}, replaying to {welcome.policy_version}"
            )
        elif self._version > 0:
            self._log(f"going on from version {self._version}")
            await self._publisher.publish(self._version)

    @property
    def _goes_on(self) -> bool:
        if self._is_catching_up:
            return True
        return self._version < self._config.run.updates and self._reached is None

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
            elif isinstance(message, m.Welcome):  # its journal could not follow: it follows us
                self._catch_up_version = message.policy_version
                if self._version > 0:
                    await self._publisher.publish(self._version)
            elif isinstance(message, m.MembershipChanged):
                if not self._is_catching_up:  # then all are given the version that is come to
                    await self._publisher.publish(self._version)
            elif isinstance(message, m.TargetReached):
                self._reached = message
                if not self._is_catching_up:
                    return None

    async def _update(
        self, groups: list[Group], wait_s: float, last_sync_s: float | None
    ) -> float | None:
        """One optimiser update and its broadcast; returns the seconds the broadcast took, or None
        when there was none."""
        result = await asyncio.to_thread(self._updates.update, groups)
        lease_ids = [group.lease_id for group in groups]
        self._progress = self._progress.updated(
            lease_ids, skipped=result.skipped, completions=result.completions, tokens=result.tokens
        )
        metrics = dict(result.metrics)
        metrics |= {
            "time/wait_s": wait_s,
            "time/train_s": result.train_s,
            "completions_per_update": float(result.completions),
            "completions_trained": float(self._progress.completions_trained),
        }
        if last_sync_s is not None:
            metrics["time/sync_s"] = last_sync_s
        if result.skipped and not self._told_of_skipping:
            self._told_of_skipping = True
            self._tell(f"update {self._version} was skipped, {result.skip_reason}")
        notice, self._untold = self._untold, ""
        await self._link.send(
            m.Trained(
                policy_version=self._version,
                lease_ids=lease_ids,
                skipped=result.skipped,
                groups_trained=self._progress.groups_trained,
                completions_trained=self._progress.completions_trained,
                tokens_trained=self._progress.tokens_trained,
                metrics=metrics,
                notice=notice,
            )
        )
        if self._is_catching_up:
            return None
        began_s = self._clock()
        await self._publisher.publish(self._version)
        sync_s = self._clock() - began_s
        every = self._config.learner.checkpoint_every
        if every and self._version % every == 0 and self._version < self._config.run.updates:
            self._progress = await self._checkpointer.prepare(self._progress)
            try:
                self._progress = await self._checkpointer.save(self._progress)
            except OSError as error:
                text = f"checkpoint of version {self._version} could not be saved: {error}"
                self._tell(f"{text}; training goes on")
        return sync_s

    def _tell(self, notice: str) -> None:
        """A person should know: in the log now, on the terminal with the next update, and again
        in the closing words."""
        self._log(notice)
        self._notices.append(notice)
        self._untold = notice

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    # --- the end -----------------------------------------------------------------------------

    async def _finish(self) -> Finished:
        evaluate = self._version >= self._config.run.updates
        completed = evaluate or self._reached is not None
        reason = "completed" if completed else self._stop.reason
        if not evaluate and (reached := self._reached) is not None:
            reason = f"accuracy {reached.accuracy:.3f} reached at version {reached.policy_version}"
        # While catching up, the older checkpoint and the journal are what the run goes on from.
        is_due = self._version != self._checkpointer.saved_version and not self._is_catching_up
        if self._config.run.updates == 0:  # evaluated only: the model is what was given
            is_due = False
        if is_due:
            self._progress = await self._checkpointer.prepare(self._progress)
        await self._link.send(
            m.FinishRun(
                policy_version=self._version,
                evaluate=evaluate,
                reason=reason,
                stopped=not completed,
            )
        )
        summarising = asyncio.create_task(self._await_summary(evaluate=evaluate), name="summary")
        save_error = ""
        if is_due:
            try:
                await self._checkpointer.save(
                    self._progress, service_stays=lambda: not summarising.done()
                )
            except OSError as error:  # the run's results are still to be written
                save_error = f"the last checkpoint could not be saved: {error}"
        summary = await summarising
        return Finished(
            reason=str(summary.fields.get("reason", reason)),
            outcome=str(summary.fields.get("outcome", "completed" if completed else "stopped")),
            policy_version=self._version,
            optimizer_updates=self._version - self._progress.num_skipped,
            completions_trained=self._progress.completions_trained,
            tokens_trained=self._progress.tokens_trained,
            skipped_updates=self._progress.num_skipped,
            accuracy_reached=self._reached.accuracy if self._reached else None,
            save_error=save_error,
            notices=tuple(self._notices),
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
