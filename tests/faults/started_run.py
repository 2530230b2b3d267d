"""A run with the environment that a drill needs; everything is cleaned up afterwards."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.launcher.exit_status import EXIT_INTERRUPTED
from speed_async.observability.metrics import Event
from tests.faults.disk import small_disk
from tests.faults.injector import Injector
from tests.faults.proxy import Proxy
from tests.faults.settings import DISK_BYTES, PEER_TIMEOUT_S, Plan, write_config
from tests.faults.targets import MARK, Targets
from tests.faults.watcher import Watcher

END_DEADLINE_S = 300.0


class DrillFailed(AssertionError):
    """The run violated an invariant. The text names it and contains log excerpts."""


@dataclass(kw_only=True)
class StartedRun:
    plan: Plan
    process: subprocess.Popen[bytes]
    targets: Targets
    watcher: Watcher
    injector: Injector
    run_folder: Path
    trace_folder: Path

    def await_recovery(self, timeout_s: float, *, since_s: float, past_version: int) -> None:
        """Wait until the metrics feed reports that all actors are alive, the ledger balances, and a
        new version exists; or until the run has finished."""
        wanted = {"service", "learner"}
        for index in range(1, self.plan.num_actors + 1):
            wanted |= {f"actor-{index}", f"engine-{index}", f"supervisor-{index}"}

        def has_recovered(event: Event) -> bool:
            values: dict[str, Any] = event.values
            return (
                values.get("policy_version", 0) > past_version
                and values.get("actors_alive") == self.plan.num_actors
                and values.get("ledger_closes") is True
            )

        deadline_s = time.monotonic() + timeout_s
        while not self.watcher.wait(has_recovered, since_s, 0.25) or (
            wanted - set(self.targets.all())
        ):
            self.check_running()
            if time.monotonic() > deadline_s:
                latest = self.watcher.latest()
                running = sorted(self.targets.all())
                self.fail(f"not recovered within {timeout_s:.0f} s: {running}, {latest}")

    def check_running(self) -> None:
        """Raises DrillFailed if the run has ended."""
        if (status := self.process.poll()) is not None:
            self.fail(f"the run ended with status {status}")

    def stop(self) -> int:
        """Send Ctrl-C and return the run's policy version. Raises DrillFailed."""
        os.killpg(self.process.pid, signal.SIGINT)
        self._await_end(status=EXIT_INTERRUPTED)
        return int(json.loads((self.run_folder / "summary.json").read_text())["policy_version"])

    def resume(self, num_updates: int) -> None:
        """Resume up to `num_updates` in total and wait until the run ends. Raises DrillFailed."""
        folder = str(self.run_folder)
        self.process = _open(self.targets, "--resume", folder, "--run.updates", str(num_updates))
        self._await_end(status=0)

    def _await_end(self, *, status: int) -> None:
        try:
            exit_status = self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.fail(f"not ended within {END_DEADLINE_S:.0f} s; latest: {self.watcher.latest()}")
            return
        if exit_status != status:
            self.fail(f"the run ended with status {exit_status}, not {status}")
        _wait_for(lambda: not self.targets.commands(), 10.0)
        if left := self.targets.commands():
            self.fail(f"processes outlive the run: {left}")

    def fail(self, why: str) -> None:
        excerpts = [f"{path.name}: {_tail(path)}" for path in self._logs()]
        raise DrillFailed("\n".join([why, f"warnings: {self.watcher.warnings[-10:]}", *excerpts]))

    def _logs(self) -> list[Path]:
        return sorted([*self.run_folder.parents[1].glob("*.txt"), *self.run_folder.glob("logs/*")])


@contextmanager
def start_run(folder: Path, plan: Plan) -> Iterator[StartedRun]:
    """Start a run on a small disk behind a proxy. On exit, all its processes are killed."""
    service_port, feed_port = _free_ports(2)
    trace_folder, config = folder / "trace", folder / "config.toml"
    trace_folder.mkdir()
    targets = Targets(mark=str(folder))
    with (
        small_disk(folder / "disk", DISK_BYTES) as disk,
        Proxy(service_port) as proxy,
        Watcher(feed_port) as watcher,
    ):
        run_folder = disk.folder / "run"
        write_config(
            config,
            plan,
            run_folder=run_folder,
            trace_folder=trace_folder,
            service_port=service_port,
            advertised_port=proxy.port,
            feed_port=feed_port,
        )
        injector = Injector(
            targets=targets,
            proxy=proxy,
            disk=disk,
            run_folder=run_folder,
            num_actors=plan.num_actors,
            peer_timeout_s=PEER_TIMEOUT_S,
        )
        run = StartedRun(
            plan=plan,
            process=_open(targets, str(config)),
            targets=targets,
            watcher=watcher,
            injector=injector,
            run_folder=run_folder,
            trace_folder=trace_folder,
        )
        try:
            yield run
        finally:
            run.process.kill()
            run.process.wait()
            targets.kill_all()


def _open(targets: Targets, *arguments: str) -> subprocess.Popen[bytes]:
    """Run `speed-async train` in a session of its own, in the folder that marks its processes."""
    folder = Path(targets.mark)
    with (folder / "stdout.txt").open("ab") as out, (folder / "stderr.txt").open("ab") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "speed_async", "train", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", MARK: targets.mark},
        )


def _free_ports(count: int) -> list[int]:
    """Ports that are free now and outside the ephemeral range, so that a restarted service can
    bind its port again."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise DrillFailed("no free ports between 20000 and 32000")


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _tail(path: Path, num_lines: int = 12) -> str:
    return "\n  ".join(path.read_text(errors="replace").splitlines()[-num_lines:])
