"""What signals ask of the leading learner: to stop in order, or, at a second Ctrl-C, at once."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable

from speed_async.launcher.event_loop import stop_signals
from speed_async.launcher.exit_status import EXIT_INTERRUPTED
from speed_async.launcher.processes import end_process
from speed_async.launcher.run_folder import RunFolder
from speed_async.learner.inbox import Stop
from speed_async.observability.summary import STOPPING, resume_line

SECOND_AFTER_S = 1.0
"""One Ctrl-C may come twice: from the terminal, and forwarded by the launcher."""
CONSOLE_GRACE_S = 1.0


class Stopping:
    """Takes SIGINT and SIGTERM over. Only SIGINT counts as a second Ctrl-C."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = Stop()
        self._clock = clock
        self._asked_s = 0.0
        self._console: asyncio.subprocess.Process | None = None
        self._folder: RunFolder | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._is_over = False

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for stopper in stop_signals():
            is_ctrl_c = stopper == signal.SIGINT
            loop.add_signal_handler(stopper, self.interrupted if is_ctrl_c else self.terminated)

    def shown_by(self, console: asyncio.subprocess.Process, folder: RunFolder) -> None:
        """From here on the console draws on the terminal, and shows what the service says."""
        self._console, self._folder = console, folder

    def over(self) -> None:
        """The last checkpoint is written: nothing is left to stop."""
        self._is_over = True

    def terminated(self) -> None:
        if self.asked.is_set():
            return
        self._asked_s = self._clock()
        self.asked.set()
        if self._console is None:
            sys.stderr.write(f"{STOPPING}\n")
            sys.stderr.flush()

    def interrupted(self) -> None:
        if not self.asked.is_set():
            self.terminated()
        elif (
            not self._is_over
            and self._leaving is None
            and self._clock() - self._asked_s >= SECOND_AFTER_S
        ):
            self._leaving = asyncio.get_running_loop().create_task(self._leave(), name="leave")

    async def _leave(self) -> None:
        """End this process; the kernel ends the service with it, whose journal is whole. An update
        that runs in a thread cannot be cancelled, so nothing is waited for but the console, which
        gives the terminal back."""
        if self._console is not None:
            await end_process(self._console, CONSOLE_GRACE_S)
        if self._is_over:  # meanwhile
            return
        text = "stopped at once by a second Ctrl-C, without a last checkpoint and a summary\n"
        if self._folder is not None:
            text += f"{resume_line(str(self._folder.path))}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
