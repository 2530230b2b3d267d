"""Supervision of the buffer service's process by the leading learner.

consumes   the exit of the process
restarts   a service that was killed by a signal: it recovers from its journal at the same ports;
           a service that failed with an error is not restarted, because it would fail again
"""

import asyncio
import json
import signal
import sys

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError
from speed_async.launcher.attempt import Ports
from speed_async.launcher.exit_status import recorded
from speed_async.launcher.processes import end_process, start_role
from speed_async.launcher.run_folder import RunFolder

EARLY_EXIT_S = 5.0
"""A service that is killed within this time after its start counts as an early exit."""
MAX_EARLY_EXITS = 5
RESTART_PAUSE_S = 0.1


class ServiceProcess:
    def __init__(self, config: Config, folder: RunFolder, *, attempt: int) -> None:
        self.ports = Ports()
        """Ports that the service has bound."""
        self._config = config
        self._folder = folder
        self._attempt = attempt
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, ports: Ports) -> None:
        """Start the service at the given ports (0: any). Restarts it if it is killed before it
        reports its ports. Raises RoleError with its message."""
        for _ in range(MAX_EARLY_EXITS + 1):
            if await self._start_once(ports):
                return
            await asyncio.sleep(RESTART_PAUSE_S)
        raise self.error()

    async def _start_once(self, ports: Ports) -> bool:
        """Start the process and read its ports. Returns False if it was killed first."""
        folder = self._folder
        folder.error("service").unlink(missing_ok=True)  # left by an earlier process
        arguments = ["--config", str(folder.config), "--run-folder", str(folder.path)]
        arguments += ["--attempt", str(self._attempt)]
        arguments += ["--port", str(ports.service), "--feed-port", str(ports.feed)]
        process = await start_role("service", arguments, log=folder.log("service"))
        self._process = process
        assert process.stdout is not None
        deadline_s = self._config.cluster.connect_timeout_s
        try:
            line = await asyncio.wait_for(process.stdout.readline(), deadline_s)
        except TimeoutError:
            await end_process(process, 0.1)
            raise DeadlineExceeded("the buffer service", "its ports", deadline_s) from None
        if line:
            bound = json.loads(line)
            self.ports = Ports(service=bound["port"], feed=bound["feed_port"])
            return True
        if await process.wait() >= 0 or not self._may_restart:
            raise self.error()
        return False

    async def watch(self) -> None:
        """Restart the service whenever it is killed; return when it has exited permanently."""
        clock = asyncio.get_running_loop().time
        early_exits = 0
        while True:
            assert self._process is not None
            started_s = clock()
            status = await self._process.wait()
            if status >= 0 or not self._may_restart:
                return
            early_exits = early_exits + 1 if clock() - started_s < EARLY_EXIT_S else 0
            if early_exits > MAX_EARLY_EXITS:
                return
            name = signal.Signals(-status).name
            sys.stderr.write(
                f"the buffer service was killed ({name}); it recovers from its journal\n"
            )
            sys.stderr.flush()
            await asyncio.sleep(RESTART_PAUSE_S)
            await self.start(self.ports)

    def error(self) -> RoleError:
        """The error that the service recorded, or a reference to its log."""
        text = recorded(self._folder.error("service"))
        return RoleError.from_text(
            text or f"buffer service: died; see {self._folder.log('service')}"
        )

    async def end(self, grace_s: float) -> None:
        if self._process is not None:
            await end_process(self._process, grace_s)

    @property
    def _may_restart(self) -> bool:
        return self._config.buffer.durability != "none"
