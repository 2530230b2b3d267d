"""The learner's receive queue for messages from the service.

consumes   messages of the service, as soon as they arrive
waits for  the next message, with a deadline
raises     the failure of another role, as RoleError, in every task that waits

Several tasks may wait at the same time.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.transport import messages as m
from speed_async.transport.transport import Link
from speed_async.types import Group

SERVICE_GRACE_S = 10.0
"""Margin that the learner adds to the service's own deadlines when it waits for the service."""

RECEIVE_S = 5.0
"""Longest silence in one call of the link's `receive`, which is then called again."""
REPLIES = (m.WeightMembers, m.JournalDurable)
"""Messages that only `expect` returns."""

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
    def __init__(self, link: Link, *, run_folder: str = "RUN_DIR") -> None:
        self._link = link
        self._run_folder = run_folder
        self._is_connected = False
        self._messages: deque[m.Message] = deque()
        """Received and not yet taken."""
        self._failure: BaseException | None = None
        self._news = asyncio.Event()
        """Replaced whenever it is set."""
        self._receiving: asyncio.Task[None] | None = None
        self.observers: list[Callable[[m.Message], None]] = []
        """Called with each message when it is received, in order."""
        self._silence: DeadlineExceeded | None = None
        """The link's description of what is missing, if nothing has been received for long."""

    async def next(self, deadline_s: float) -> m.Message:
        """The next message that is no reply."""
        message = await self._take(_is_no_reply, deadline_s)
        assert message is not None
        return message

    async def next_or_stop(self, stop: Stop, deadline_s: float) -> m.Message | None:
        """The next message that is no reply, or None when a stop is requested first."""
        if (message := self._find(_is_no_reply)) is not None:
            return message
        stopping = asyncio.create_task(stop.wait(), name="stop")
        stopping.add_done_callback(lambda _: self._wake())
        try:
            return await self._take(_is_no_reply, deadline_s, until=stop.is_set)
        finally:
            stopping.cancel()

    async def expect(self, kind: type[M], deadline_s: float, what: str) -> M:
        """The next message of this class."""
        message = await self._take(lambda each: isinstance(each, kind), deadline_s, what)
        assert isinstance(message, kind)
        return message

    def take_received(self, *kinds: type[M]) -> list[M]:
        """The messages of these classes that were received and not taken."""
        taken = [message for message in self._messages if isinstance(message, kinds)]
        self._messages = deque(each for each in self._messages if not isinstance(each, kinds))
        return taken

    def fail(self, error: BaseException) -> None:
        """Every task that waits raises this, unless its message has been received before."""
        if self._failure is None:
            self._failure = error
        self._wake()

    async def close(self) -> None:
        """Ends receiving."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait((self._receiving,))

    async def _take(
        self,
        accepts: Callable[[m.Message], bool],
        deadline_s: float,
        what: str = "a message",
        until: Callable[[], bool] = lambda: False,
    ) -> m.Message | None:
        """The first message that is accepted, or None if there is none when `until` holds."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._receive_all(), name="receive")
        try:
            async with asyncio.timeout(deadline_s):
                while (message := self._find(accepts)) is None:
                    if until() or self._failure is not None:
                        break
                    await self._news.wait()
        except TimeoutError:
            peer = "the buffer service"
            if self._silence is not None:
                peer, what = self._silence.peer, f"{what} ({self._silence.what})"
            raise DeadlineExceeded(peer, what, deadline_s) from None
        if message is None and self._failure is not None and not until():
            raise self._failure
        return message

    def _find(self, accepts: Callable[[m.Message], bool]) -> m.Message | None:
        for index, message in enumerate(self._messages):
            if accepts(message):
                del self._messages[index]
                return message
        return None

    async def _receive_all(self) -> None:
        while self._failure is None:
            try:
                self._add(await self._link.receive(RECEIVE_S))
            except DeadlineExceeded as error:  # the tasks that wait have deadlines of their own
                self._silence = error
            except Exception as error:  # raised in the tasks that wait
                self.fail(error)

    def _add(self, message: m.Message) -> None:
        self._silence = None
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
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def complete_batch(groups: list[Group], ready: m.BatchReady) -> list[Group]:
    """The batch. Raises RoleError when an announced group is missing."""
    missing = set(ready.lease_ids) - {group.lease_id for group in groups}
    if missing:
        raise RoleError("buffer service", f"announced groups {sorted(missing)} but never sent them")
    return groups


def _is_no_reply(message: m.Message) -> bool:
    return not isinstance(message, REPLIES)
