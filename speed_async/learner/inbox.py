"""The learner's receive queue for messages from the service.

consumes   messages of the service
waits for  the next message, with a deadline
raises     the failure of another role, as RoleError

Several tasks may wait at the same time: one of them receives for all, and after each message they
take turns.
"""

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

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
        self._messages: deque[m.Message] = deque()
        """Received and not yet taken."""
        self._expected: Counter[type[m.Message]] = Counter()
        """Classes that calls of `expect` wait for."""
        self._receiving = asyncio.Lock()
        self.observers: set[Callable[[m.Message], None]] = set()
        """Called with each message when it is received."""

    async def next(self, deadline_s: float) -> m.Message:
        """The next message that no call of `expect` waits for."""
        return await self._take(lambda message: type(message) not in self._expected, deadline_s)

    async def next_or_stop(
        self, stop: Stop, deadline_s: float, beside: asyncio.Task[Any] | None = None
    ) -> m.Message | None:
        """The next message, or None when a stop is requested first. Raises the error of the task
        `beside` if that has failed or fails first."""
        receiving = asyncio.create_task(self.next(deadline_s), name="receive")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        waiting = {receiving, stopping} if beside is None else {receiving, stopping, beside}
        try:
            while not receiving.done():
                if beside is not None and beside.done():
                    beside.result()
                    waiting.discard(beside)
                if stopping.done():
                    return None
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result()
        finally:
            stopping.cancel()
            if not receiving.done():
                receiving.cancel()
                await asyncio.wait((receiving,))

    async def expect(self, kind: type[M], deadline_s: float, what: str) -> M:
        """The next message of this class. Other messages are left to `next`."""
        self._expected[kind] += 1
        try:
            message = await self._take(lambda each: isinstance(each, kind), deadline_s, what)
        finally:
            self._expected -= Counter([kind])
        assert isinstance(message, kind)
        return message

    async def receive_all(self) -> None:
        """Receives, for `observers` and later calls of `next`, until cancelled."""
        while True:
            async with self._receiving:
                with suppress(DeadlineExceeded):  # nobody waits for a message here
                    await self._receive(SERVICE_GRACE_S)

    def discard(self, kind: type[m.Message]) -> None:
        """Drops the messages of this class that nobody has taken yet."""
        kept = [message for message in self._messages if not isinstance(message, kind)]
        self._messages = deque(kept)

    async def _take(
        self, accepts: Callable[[m.Message], bool], deadline_s: float, what: str = "a message"
    ) -> m.Message:
        """The first message that is accepted. Raises DeadlineExceeded, while another task receives
        only after the message that it waits for."""
        ends_s = self._clock() + deadline_s
        while (message := self._find(accepts)) is None:
            async with self._receiving:
                if (message := self._find(accepts)) is not None:  # another task has received it
                    break
                left_s = ends_s - self._clock()
                if left_s <= 0:
                    raise DeadlineExceeded("the buffer service", what, deadline_s)
                await self._receive(left_s)
        return message

    def _find(self, accepts: Callable[[m.Message], bool]) -> m.Message | None:
        for index, message in enumerate(self._messages):
            if accepts(message):
                del self._messages[index]
                return message
        return None

    async def _receive(self, deadline_s: float) -> None:
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
        if isinstance(message, m.MembershipChanged):  # not behind a batch: an update may take long
            self._messages.appendleft(message)
        else:
            self._messages.append(message)
        for observe in self.observers:
            observe(message)
