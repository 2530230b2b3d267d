"""Making a checkpoint together with the service: its journal first, the checkpoint after it.

consumes   the word that the journal is durable (from the service)
waits for  that word (stall deadline and grace: the service may be waiting for room), the disk
goes on    without a checkpoint that cannot be written: the caller says what that means
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from speed_async.learner.inbox import SERVICE_GRACE_S, Inbox
from speed_async.learner.progress import Progress
from speed_async.transport import messages as m
from speed_async.transport.transport import Link


class Saved(Protocol):
    """What is asked of the trainer."""

    def save(self, progress: Progress) -> int: ...


class Checkpointer:
    def __init__(
        self,
        *,
        link: Link,
        inbox: Inbox,
        updates: Saved,
        patience_s: float,
        saved_version: int | None,
    ) -> None:
        """`saved_version`: of the checkpoint that this learner goes on from."""
        self.saved_version = saved_version
        self._link = link
        self._inbox = inbox
        self._updates = updates
        self._patience_s = patience_s + SERVICE_GRACE_S

    async def prepare(self, progress: Progress) -> Progress:
        """Wait until all that led here is on the service's disk, and note up to which place.

        A checkpoint ahead of its journal would have trained groups that the journal still holds.
        """
        await self._link.send(m.PrepareCheckpoint(policy_version=progress.policy_version))
        what = "its journal to be durable"
        durable = await self._inbox.expect(m.JournalDurable, self._patience_s, what)
        return replace(progress, service_sequence=durable.service_sequence)

    async def save(
        self, progress: Progress, *, service_stays: Callable[[], bool] = lambda: True
    ) -> Progress:
        """Write the checkpoint of prepared progress and tell the service, if it is still there.

        Returns the progress that is to be remembered from here on. Raises OSError.
        """
        oldest = await asyncio.to_thread(self._updates.save, progress)
        self.saved_version = progress.policy_version
        if service_stays():
            await self._link.send(
                m.CheckpointSaved(
                    policy_version=progress.policy_version, oldest_kept_version=oldest
                )
            )
        return progress.since(oldest)
