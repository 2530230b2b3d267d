"""The learner's loop: takes a batch, updates, broadcasts, until the run completes or is stopped.

consumes   batches and membership changes (from the service)
waits for  a batch (stall deadline), the broadcast (publisher.py), the journal before a checkpoint,
           the final summary
unblocked by  the service; a stop request takes effect between two steps

A version is broadcast while the next batch is received and its gradient computed; the optimiser's
step waits for the broadcast. Without `run.overlap`, the learner waits for it at once.

A restarted learner catches up first. The service is then at a later version than the last
checkpoint, and sends the batches of the missing updates again. During this replay, the learner
publishes no weights, because the actors already hold later ones, and writes no checkpoint.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.learner.activity_times import ActivityTimes
from speed_async.learner.checkpoint.checkpointer import Checkpointer
from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox, Stop, complete_batch
from speed_async.learner.notices import Notices
from speed_async.learner.progress import Progress, Restored, RunResult
from speed_async.learner.publisher import Publisher
from speed_async.learner.trainer import Trainer
from speed_async.observability.summary import STOPPING
from speed_async.transport import messages as m
from speed_async.transport.groups import unpack_group
from speed_async.transport.transport import Link
from speed_async.types import Group, WeightBackend
from speed_async.weight_sync.channel import WeightSender


class LearnerLoop:
    def __init__(
        self,
        config: Config,
        *,
        link: Link,
        trainer: Trainer,
        sender: WeightSender,
        backend: WeightBackend,
        stop: Stop,
        restored: Restored | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`restored` describes the checkpoint that `trainer` was restored from; None starts a new
        run."""
        self._config = config
        self._link = link
        self._trainer = trainer
        self._stop = stop
        self._inbox = Inbox(link, run_folder=config.run.folder)
        self._publisher = Publisher(
            config.weights,
            link=link,
            inbox=self._inbox,
            trainer=trainer,
            sender=sender,
            backend=backend,
            timeout_s=config.cluster.stall_timeout_s,
            clock=clock,
        )
        self._restored = restored
        self._progress = restored.progress if restored else Progress()
        self._checkpointer = Checkpointer(
            link=link,
            inbox=self._inbox,
            trainer=trainer,
            timeout_s=config.cluster.stall_timeout_s,
            saved_version=self._version if restored else None,
            in_background=config.learner.background_checkpoints,
        )
        self._catch_up_version = 0
        """Policy version of the service. Updates up to it are replayed without publishing."""
        self._reached: m.TargetReached | None = None
        self._notices = Notices(restored.notices if restored else ())
        self._skip_reported = False
        self._times = ActivityTimes(clock)
        """Since the last update: what follows an update is reported with the next one."""

    @property
    def _version(self) -> int:
        return self._progress.policy_version

    @property
    def _is_catching_up(self) -> bool:
        return self._version < self._catch_up_version

    async def run(self, hello: m.Hello) -> RunResult:
        """Trains until `run.updates` or a stop. Raises the error that fails the run."""
        try:
            await self._connect(hello)
            return await self._train()
        finally:
            await self._publisher.close()
            await self._inbox.close()

    async def _train(self) -> RunResult:
        announcing = asyncio.create_task(self._announce_stop(), name="stop")
        try:
            while self._should_continue and not self._stop.is_set():
                with self._times.measure("wait"):
                    groups = await self._take_batch()
                if groups is None:
                    break
                await self._update(groups)
            return await self._finish()
        finally:
            announcing.cancel()

    async def _announce_stop(self) -> None:
        """Acknowledges a stop request at once, since the current update may take minutes."""
        await self._stop.wait()
        self._notices.log(STOPPING)
        with contextlib.suppress(SpeedAsyncError):  # the run may have ended
            await self._link.send(m.StopAsked())

    async def _connect(self, hello: m.Hello) -> None:
        """Registers with the service, and publishes the current version if there is one."""
        await self._link.send(hello)
        timeout_s = self._config.cluster.connect_timeout_s
        welcome = await self._inbox.expect(m.Welcome, timeout_s, "its welcome")
        self._catch_up_version = welcome.policy_version
        if self._restored is not None or welcome.policy_version > 0:
            await self._link.send(self._progress.resumed(notice="; ".join(self._notices.all)))
        if self._is_catching_up:
            self._notices.log(
                f"resuming from version {self._version}, replaying to {welcome.policy_version}"
            )
        elif self._version > 0:
            self._notices.log(f"resuming from version {self._version}")
            await self._publisher.publish(self._version)

    @property
    def _should_continue(self) -> bool:
        if self._is_catching_up:
            return True
        return self._version < self._config.run.updates and self._reached is None

    async def _take_batch(self) -> list[Group] | None:
        """The next batch, or None when a stop comes first."""
        take = m.TakeBatch(
            policy_version=self._version, num_groups=self._config.learner.groups_per_update
        )
        await self._link.send(take)
        # The service reports the cause of a stall, and BatchPending while there is none.
        timeout_s = self._config.cluster.stall_timeout_s + SERVICE_GRACE_S
        groups: list[Group] = []
        while True:
            message = await self._inbox.next_or_stop(self._stop, timeout_s)
            if message is None:
                return None
            if isinstance(message, m.GroupFinished):
                groups.append(unpack_group(message))
            elif isinstance(message, m.BatchReady):
                return complete_batch(groups, message)
            elif isinstance(message, m.Welcome):  # its journal is behind: it adopts our version
                self._catch_up_version = message.policy_version
                if self._version > 0:
                    await self._broadcast()
            elif isinstance(message, m.MembershipChanged):
                if not self._is_catching_up:  # otherwise publish once, at the end of the replay
                    await self._broadcast()
            elif isinstance(message, m.EvaluationBegan | m.EvaluationEnded):
                self._keep_best(message)
            elif isinstance(message, m.TargetReached):
                self._reached = message
                if not self._is_catching_up:
                    return None

    async def _update(self, groups: list[Group]) -> None:
        """One update, the start of its broadcast, and its checkpoint if one is due."""

        def wait_for_broadcast() -> None:
            with self._times.measure("sync"):
                self._publisher.wait_in_thread()

        with self._times.measure("train"):
            result = await asyncio.to_thread(self._trainer.update, groups, wait_for_broadcast)
        lease_ids = [group.lease_id for group in groups]
        self._progress = self._progress.updated(
            lease_ids,
            optimizer_updates=result.optimizer_updates,
            num_skipped=result.num_skipped,
            completions=result.completions,
            tokens=result.tokens,
        )
        if result.skip_reason and not self._skip_reported:
            self._skip_reported = True
            what = "was skipped" if result.skipped else "was partly skipped"
            self._notices.add(f"update {self._version} {what}, {result.skip_reason}")
        metrics = {
            **result.metrics,
            **self._times.take(),
            "completions_per_update": float(result.completions),
            "completions_trained": float(self._progress.completions_trained),
        }
        notice = self._notices.take_unsent()
        await self._link.send(
            self._progress.trained(
                lease_ids, skipped=result.skipped, metrics=metrics, notice=notice
            )
        )
        if self._is_catching_up:
            return
        await self._broadcast()
        every = self._config.learner.checkpoint_every
        if every and self._version % every == 0 and self._version < self._config.run.updates:
            with self._times.measure("checkpoint"):
                await self._checkpoint()
        self._report_failed_checkpoint()

    async def _checkpoint(self) -> None:
        self._progress = await self._checkpointer.prepare(self._progress)
        await self._publisher.wait()  # several ranks gather weights for one purpose at a time
        for message in self._inbox.take_received(m.EvaluationBegan, m.EvaluationEnded):
            self._keep_best(message)  # older checkpoints are removed next
        await self._checkpointer.save(self._progress)

    async def _broadcast(self) -> None:
        """Begins the broadcast of this version; without `run.overlap`, waits for its end."""
        with self._times.measure("sync"):
            await self._publisher.begin(self._version)
            if not self._config.run.overlap:
                await self._publisher.wait()

    def _report_failed_checkpoint(self) -> None:
        if failure := self._checkpointer.take_failure():
            self._notices.add(f"{failure}; training continues")

    def _keep_best(self, message: m.EvaluationBegan | m.EvaluationEnded) -> None:
        if failure := self._checkpointer.evaluated(message):
            self._notices.add(failure)

    # --- shutdown ----------------------------------------------------------------------------

    async def _finish(self) -> RunResult:
        evaluate = self._version >= self._config.run.updates
        completed = evaluate or self._reached is not None
        reason = "completed" if completed else self._stop.reason
        if not evaluate and (reached := self._reached) is not None:
            reason = f"accuracy {reached.accuracy:.3f} reached at version {reached.policy_version}"
        await self._publisher.wait()
        await self._checkpointer.wait()
        self._report_failed_checkpoint()
        # A replay resumes from the older checkpoint and the journal. Evaluation changes nothing.
        has_trained = not self._is_catching_up and self._config.run.updates > 0
        is_due = has_trained and self._version != self._checkpointer.saved_version
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
        if is_due:
            await self._checkpointer.save(
                self._progress, is_service_connected=lambda: not summarising.done()
            )
            await self._checkpointer.wait()
        summary = await summarising
        return RunResult(
            reason=str(summary.fields.get("reason", reason)),
            outcome=str(summary.fields.get("outcome", "completed" if completed else "stopped")),
            progress=self._progress,
            accuracy_reached=self._reached.accuracy if self._reached else None,
            save_error=self._checkpointer.take_failure(),
            notices=tuple(self._notices.all),
            service_fields=summary.fields,
        )

    async def _await_summary(self, *, evaluate: bool) -> m.Summary:
        """The final summary. An actor that joins during the last evaluation receives weights."""
        # The service ends an evaluation that stalls, and sends EvaluationPending before that.
        cluster = self._config.cluster
        timeout_s = cluster.drain_timeout_s + SERVICE_GRACE_S
        if evaluate:
            timeout_s += cluster.stall_timeout_s
        while True:
            message = await self._inbox.next(timeout_s)
            if isinstance(message, m.Summary):
                return message
            if isinstance(message, m.EvaluationBegan | m.EvaluationEnded):
                self._keep_best(message)
            if isinstance(message, m.TargetReached):  # during the last update
                self._reached = message
            if isinstance(message, m.MembershipChanged) and evaluate:
                await self._publisher.publish(self._version)
