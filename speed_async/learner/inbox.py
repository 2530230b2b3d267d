"""The learner's receive queue for messages from the service.

consumes   messages of the service
waits for  the next message, with a deadline
raises     the failure of another role, as RoleError
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.transport import messages as m
from speed_async.transport.transport import Link

SERVICE_GRACE_S = 10.0
"""Margin that the learner adds to the service's own deadlines when it waits for the service."""

M = TypeVar("M", bound=m.Message)


class Stop(asyncio.Event):
    """Set when a stop of the run is requested."""

    def __init__(self) -> None:
        super().__init__()
        self._launcher = os.getppid()

    @property
    def has_lost_launcher(self) -> bool:
        """Whether the launcher has died, and the kernel has sent the stop signal. The launcher
        stays the parent, as a zombie, until its last thread has exited."""
        if os.getppid() != self._launcher:
            return True
        try:
            status = Path(f"/proc/{self._launcher}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False  # no /proc
        return status[0] in ("Z", "X")

    @property
    def reason(self) -> str:
        if self.has_lost_launcher:
            return "stopped: the launcher of this run has died"
        return "stopped by a signal"


class Inbox:
    def __init__(
        self,
        link: Link,
        clock: Callable[[], float] = time.monotonic,
        *,
        run_folder: str = "RUN_DIR",
    ) -> None:
        self._link = link
        self._clock = clock
        self._run_folder = run_folder
        self._is_connected = False
        self._deferred: deque[m.Message] = deque()

    async def next(self, deadline_s: float) -> m.Message:
        """The next message. Messages deferred by `expect` come first."""
        if self._deferred:
            return self._deferred.popleft()
        return await self._receive(deadline_s)

    async def next_or_stop(self, stop: Stop, deadline_s: float) -> m.Message | None:
        """The next message, or None when a stop is requested first."""
        receiving = asyncio.create_task(self.next(deadline_s), name="receive")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if receiving.done():
            return await receiving
        receiving.cancel()
        await asyncio.wait((receiving,))
        return None

    async def expect(self, kind: type[M], deadline_s: float, what: str) -> M:
        """The next message of this class. Other messages are deferred to later `next` calls."""
        ends_s = self._clock() + deadline_s
        while True:
            left_s = ends_s - self._clock()
            if left_s <= 0:
                raise DeadlineExceeded("the buffer service", what, deadline_s)
            message = await self._receive(left_s)
            if isinstance(message, kind):
                return message
            self._deferred.append(message)

    def defer(self, messages: Sequence[m.Message]) -> None:
        """Leaves these messages to the next `next` calls, before all other deferred ones."""
        self._deferred.extendleft(reversed(messages))

    def discard(self, kind: type[m.Message]) -> None:
        """Drops deferred messages of this class."""
        kept = [message for message in self._deferred if not isinstance(message, kind)]
        self._deferred = deque(kept)

    async def _receive(self, deadline_s: float) -> m.Message:
        message = await self._link.receive(deadline_s)
        if isinstance(message, m.Abort):
            raise RoleError(message.role, message.message)
        if isinstance(message, m.Rejected):
            text = f"refused a message of the learner: {message.reason}"
            if self._is_connected:  # the service has lost state since it accepted this learner
                text += (
                    f"; `speed-async train --resume {self._run_folder}` resumes from the newest "
                    "checkpoint (automatically with cluster.max_restarts)"
                )
            raise RoleError("buffer service", text)
        self._is_connected = self._is_connected or isinstance(message, m.Welcome)
        return message
