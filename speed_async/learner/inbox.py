"""What the service says to the learner: in order, and when it is asked for.

consumes   messages of the service
waits for  the next message, with a deadline
raises     another role's failure, as RoleError
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.transport import messages as m
from speed_async.transport.transport import Link

SERVICE_GRACE_S = 10.0
"""How much longer than the service's own deadlines the learner waits for the service."""

M = TypeVar("M", bound=m.Message)


class Stop(asyncio.Event):
    """Set when the run is to be stopped."""

    def __init__(self) -> None:
        super().__init__()
        self._launcher = os.getppid()

    @property
    def has_lost_launcher(self) -> bool:
        """Whoever started this process has died, and the kernel sent the signal that stops it:
        a moment before this is true, while threads of the launcher are left."""
        return os.getppid() != self._launcher

    @property
    def reason(self) -> str:
        gone = self.has_lost_launcher
        return "stopped: the launcher of this run has died" if gone else "stopped by a signal"


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
        self._is_welcome = False
        self._set_aside: deque[m.Message] = deque()

    async def next(self, deadline_s: float) -> m.Message:
        """Next message, first those that came while another was expected."""
        if self._set_aside:
            return self._set_aside.popleft()
        return await self._receive(deadline_s)

    async def next_or_stop(self, stop: Stop, deadline_s: float) -> m.Message | None:
        """Next message, or None when a stop is asked for first."""
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

    def forget(self, kind: type[m.Message]) -> None:
        """Drop what was kept for later of this kind."""
        kept = [message for message in self._set_aside if not isinstance(message, kind)]
        self._set_aside = deque(kept)

    async def _receive(self, deadline_s: float) -> m.Message:
        message = await self._link.receive(deadline_s)
        if isinstance(message, m.Abort):
            raise RoleError(message.role, message.message)
        if isinstance(message, m.Rejected):
            text = f"refused a message of the learner: {message.reason}"
            if self._is_welcome:  # it was in step once; a service that lost a part of it is not
                text += (
                    f"; `speed-async train --resume {self._run_folder}` goes on from the newest "
                    "checkpoint (with cluster.max_restarts the run does so by itself)"
                )
            raise RoleError("buffer service", text)
        self._is_welcome = self._is_welcome or isinstance(message, m.Welcome)
        return message
