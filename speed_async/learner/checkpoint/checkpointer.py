"""Coordinates a checkpoint with the service: the journal becomes durable first.

A checkpoint is captured between two updates and, with `learner.background_checkpoints`, written
while training continues; the next one waits for it.

consumes   the acknowledgement that the journal is durable (from the service)
waits for  that acknowledgement (stall deadline plus grace: the service may be waiting for disk
           space), the disk
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from speed_async.learner.checkpoint.captured import Captured
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
        in_background: bool,
    ) -> None:
        """`saved_version` is the version of the checkpoint from which this learner resumed."""
        self.saved_version = saved_version
        """Version of the last checkpoint that is complete."""
        self._failure = ""
        self._oldest_kept: int | None = None
        self._writing: asyncio.Task[None] | None = None
        self._link = link
        self._inbox = inbox
        self._trainer = trainer
        self._timeout_s = timeout_s + SERVICE_GRACE_S
        self._in_background = in_background

    def evaluated(self, message: m.EvaluationBegan | m.EvaluationEnded) -> str:
        """Keeps the checkpoint under evaluation, or the best one. Returns why it could not, or an
        empty text."""
        best = self._trainer.best
        try:
            if isinstance(message, m.EvaluationBegan):
                best.began(message.suite, message.policy_version)
            else:
                best.ended(message.suite, message.policy_version, message.accuracy)
        except OSError as error:
            return f"the best checkpoint of {message.suite} could not be linked: {error}"
        return ""

    async def prepare(self, progress: Progress) -> Progress:
        """Waits until the service's journal is durable up to this progress, and records its
        sequence number. Returns the progress without updates that every kept checkpoint includes.

        A checkpoint ahead of its journal would include groups that the journal still has as
        untrained.
        """
        await self.wait()
        if self._oldest_kept is not None:
            progress = progress.since(self._oldest_kept)
        await self._link.send(m.PrepareCheckpoint(policy_version=progress.policy_version))
        what = "its journal to be durable"
        durable = await self._inbox.expect(m.JournalDurable, self._timeout_s, what)
        return replace(progress, service_sequence=durable.service_sequence)

    async def save(
        self, progress: Progress, *, is_service_connected: Callable[[], bool] = lambda: True
    ) -> None:
        """Captures the checkpoint of prepared progress, and begins to write it. Then notifies the
        service if it is connected."""
        captured = await asyncio.to_thread(self._trainer.capture, copy=self._in_background)
        write = self._write(progress, captured, is_service_connected)
        self._writing = asyncio.create_task(write, name="checkpoint")
        if not self._in_background:
            await self.wait()

    async def wait(self) -> None:
        """Until no checkpoint is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def take_failure(self) -> str:
        """Why a checkpoint could not be written, once; empty otherwise. Raises what ended the last
        write, if that is no OSError."""
        if self._writing is not None and self._writing.done():
            self._writing.result()
        failure, self._failure = self._failure, ""
        return failure

    async def _write(
        self, progress: Progress, captured: Captured, is_service_connected: Callable[[], bool]
    ) -> None:
        version = progress.policy_version
        try:
            await asyncio.to_thread(self._trainer.write, progress, captured)
        except OSError as error:
            self._failure = f"checkpoint of version {version} could not be saved: {error}"
            return
        self.saved_version = version
        try:
            oldest = await asyncio.to_thread(self._trainer.prune)
        except OSError as error:
            self._failure = f"older checkpoints could not be removed: {error}"
            return
        self._oldest_kept = oldest
        with contextlib.suppress(OSError):  # tried again after the next evaluation
            self._trainer.best.update()
        if is_service_connected():
            await self._link.send(
                m.CheckpointSaved(policy_version=version, oldest_kept_version=oldest)
            )
