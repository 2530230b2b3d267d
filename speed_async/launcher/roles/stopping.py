"""Stop signals of the leading learner: a graceful stop, or an immediate exit on a second Ctrl-C."""

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
"""One Ctrl-C may arrive twice: from the terminal, and forwarded by the launcher."""
CONSOLE_GRACE_S = 1.0


class Stopping:
    """Handles all stop signals. Only SIGINT counts as a second Ctrl-C."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stop = Stop()
        self._clock = clock
        self._stopped_s = 0.0
        self._console: asyncio.subprocess.Process | None = None
        self._folder: RunFolder | None = None
        self._exiting: asyncio.Task[None] | None = None
        self._is_complete = False

    def install(self) -> None:
        """Install the signal handlers in the running loop."""
        loop = asyncio.get_running_loop()
        for stop_signal in stop_signals():
            is_ctrl_c = stop_signal == signal.SIGINT
            handler = self._on_interrupt if is_ctrl_c else self._on_terminate
            loop.add_signal_handler(stop_signal, handler)

    def attach_console(self, console: asyncio.subprocess.Process, folder: RunFolder) -> None:
        """From now on the console owns the terminal and shows the status of the service."""
        self._console, self._folder = console, folder

    def complete(self) -> None:
        """The last checkpoint is written; later signals have no effect."""
        self._is_complete = True

    def _on_terminate(self) -> None:
        if self.stop.is_set():
            return
        self._stopped_s = self._clock()
        self.stop.set()
        if self._console is None:
            sys.stderr.write(f"{STOPPING}\n")
            sys.stderr.flush()

    def _on_interrupt(self) -> None:
        if not self.stop.is_set():
            self._on_terminate()
        elif (
            not self._is_complete
            and self._exiting is None
            and self._clock() - self._stopped_s >= SECOND_AFTER_S
        ):
            self._exiting = asyncio.get_running_loop().create_task(self._exit_now(), name="exit")

    async def _exit_now(self) -> None:
        """Exit this process. The kernel kills the service with it; the journal stays consistent.
        An update in a thread cannot be cancelled, so only the console is waited for: it restores
        the terminal."""
        if self._console is not None:
            await end_process(self._console, CONSOLE_GRACE_S)
        if self._is_complete:  # completed in the meantime
            return
        text = "stopped immediately by a second Ctrl-C, without a final checkpoint and summary\n"
        if self._folder is not None:
            text += f"{resume_line(str(self._folder.path))}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
