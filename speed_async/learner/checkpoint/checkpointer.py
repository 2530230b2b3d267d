"""Coordinates a checkpoint with the service: the journal becomes durable first.

consumes   the acknowledgement that the journal is durable (from the service)
waits for  that acknowledgement (stall deadline plus grace: the service may be waiting for disk
           space), the disk
raises     OSError when the checkpoint cannot be written; the caller handles it
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.learner.progress import Progress
from speed_async.learner.trainer import Trainer
from speed_async.transport import messages as m
from speed_async.transport.transport import Link


class Checkpointer:
    def __init__(
        self,
        *,
        link: Link,
        inbox: Inbox,
        trainer: Trainer,
        timeout_s: float,
        saved_version: int | None,
    ) -> None:
        """`saved_version` is the version of the checkpoint from which this learner resumed."""
        self.saved_version = saved_version
        self._link = link
        self._inbox = inbox
        self._trainer = trainer
        self._timeout_s = timeout_s + SERVICE_GRACE_S

    def evaluated(self, message: m.EvaluationBegan | m.EvaluationEnded) -> None:
        """Keep the checkpoint under evaluation, or the best one. Raises OSError."""
        best = self._trainer.best
        if isinstance(message, m.EvaluationBegan):
            best.began(message.suite, message.policy_version)
        else:
            best.ended(message.suite, message.policy_version, message.accuracy)

    async def prepare(self, progress: Progress) -> Progress:
        """Waits until the service's journal is durable up to this progress, and records its
        sequence number.

        A checkpoint ahead of its journal would include groups that the journal still has as
        untrained.
        """
        await self._link.send(m.PrepareCheckpoint(policy_version=progress.policy_version))
        what = "its journal to be durable"
        durable = await self._inbox.expect(m.JournalDurable, self._timeout_s, what)
        return replace(progress, service_sequence=durable.service_sequence)

    async def save(
        self, progress: Progress, *, is_service_connected: Callable[[], bool] = lambda: True
    ) -> Progress:
        """Writes the checkpoint of prepared progress and notifies the service if it is connected.

        Returns the progress without updates that every kept checkpoint includes. Raises OSError.
        """
        oldest = await asyncio.to_thread(self._trainer.save, progress)
        self.saved_version = progress.policy_version
        with contextlib.suppress(OSError):  # tried again after the next evaluation
            self._trainer.best.update()
        if is_service_connected():
            await self._link.send(
                m.CheckpointSaved(
                    policy_version=progress.policy_version, oldest_kept_version=oldest
                )
            )
        return progress.since(oldest)
