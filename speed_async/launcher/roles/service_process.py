"""The buffer service's process, seen from the leading learner that starts it.

consumes   the process's exit
restarts   a service that was killed by a signal: it goes on from its journal at the same ports;
           one that failed with an error of its own would fail again
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

HASTY_S = 5.0
"""A service that is killed again this soon after its start counts as a hasty death."""
MAX_HASTY_DEATHS = 5
RESTART_PAUSE_S = 0.1


class ServiceProcess:
    def __init__(self, config: Config, folder: RunFolder, *, life: int) -> None:
        self.ports = Ports()
        """What it has bound."""
        self._config = config
        self._folder = folder
        self._life = life
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, ports: Ports) -> None:
        """Start it, at these ports where they are not 0; one that is killed before it has said
        which it has is started again. Raises RoleError with its own words."""
        for _ in range(MAX_HASTY_DEATHS + 1):
            if await self._has_started(ports):
                return
            await asyncio.sleep(RESTART_PAUSE_S)
        raise self.error()

    async def _has_started(self, ports: Ports) -> bool:
        """False when it was killed first."""
        folder = self._folder
        folder.error("service").unlink(missing_ok=True)  # of an earlier one
        arguments = ["--config", str(folder.config), "--run-folder", str(folder.path)]
        arguments += ["--life", str(self._life)]
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
        """Return when it has ended for good; start it again whenever it is killed."""
        clock = asyncio.get_running_loop().time
        hasty_deaths = 0
        while True:
            assert self._process is not None
            began_s = clock()
            status = await self._process.wait()
            if status >= 0 or not self._may_restart:
                return
            hasty_deaths = hasty_deaths + 1 if clock() - began_s < HASTY_S else 0
            if hasty_deaths > MAX_HASTY_DEATHS:
                return
            name = signal.Signals(-status).name
            sys.stderr.write(
                f"the buffer service was killed ({name}); it goes on from its journal\n"
            )
            sys.stderr.flush()
            await asyncio.sleep(RESTART_PAUSE_S)
            await self.start(self.ports)

    def error(self) -> RoleError:
        """Its own words, or where to read."""
        text = recorded(self._folder.error("service"))
        return RoleError.quoting(
            text or f"buffer service: died; read {self._folder.log('service')}"
        )

    async def end(self, grace_s: float) -> None:
        if self._process is not None:
            await end_process(self._process, grace_s)

    @property
    def _may_restart(self) -> bool:
        return self._config.buffer.durability != "none"
