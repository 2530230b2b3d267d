"""A run with everything around it that a drill needs, and no trace of it afterwards."""

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

from chaos.disk import small_disk
from chaos.injector import Injector
from chaos.proxy import Proxy
from chaos.settings import DISK_BYTES, PEER_TIMEOUT_S, Plan, write_config
from chaos.targets import MARK, Targets
from chaos.watcher import Watcher
from speed_async.launcher.exit_status import EXIT_INTERRUPTED
from speed_async.observability.metrics import Event

END_DEADLINE_S = 300.0


class DrillFailed(AssertionError):
    """The run did not keep its promises; the text says which, and where to look."""


@dataclass(kw_only=True)
class StartedRun:
    plan: Plan
    process: subprocess.Popen[bytes]
    targets: Targets
    watcher: Watcher
    injector: Injector
    run_folder: Path
    trace_folder: Path

    def await_whole(self, timeout_s: float, *, since_s: float, past_version: int) -> None:
        """Until the feed says that all actors work, the ledger closes, and a new version is there;
        or until the run has ended well."""
        wanted = {"service", "learner"}
        for index in range(1, self.plan.num_actors + 1):
            wanted |= {f"actor-{index}", f"engine-{index}", f"supervisor-{index}"}

        def is_whole(event: Event) -> bool:
            values = event.values
            return (
                values.get("policy_version", 0) > past_version
                and values.get("actors_alive") == self.plan.num_actors
                and values.get("ledger_closes") is True
            )

        ends_s = time.monotonic() + timeout_s
        while not self.watcher.wait(is_whole, since_s, 0.25) or wanted - set(self.targets.all()):
            self.check_running()
            if time.monotonic() > ends_s:
                latest = self.watcher.latest()
                there = sorted(self.targets.all())
                self.fail(f"not whole within {timeout_s:.0f} s: {there}, {latest}")

    def check_running(self) -> None:
        """Raises DrillFailed when the run has ended."""
        if (status := self.process.poll()) is not None:
            self.fail(f"the run ended with status {status}")

    def stop(self) -> int:
        """Ctrl-C; returns the policy version that the run has come to. Raises DrillFailed."""
        os.killpg(self.process.pid, signal.SIGINT)
        self._await_end(status=EXIT_INTERRUPTED)
        return int(json.loads((self.run_folder / "summary.json").read_text())["policy_version"])

    def resume(self, num_updates: int) -> None:
        """Go on to this many updates in all, and see the run end by itself. Raises DrillFailed."""
        folder = str(self.run_folder)
        self.process = _open(self.targets, "--resume", folder, "--run.updates", str(num_updates))
        self._await_end(status=0)

    def _await_end(self, *, status: int) -> None:
        try:
            ended = self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.fail(f"no end within {END_DEADLINE_S:.0f} s; latest: {self.watcher.latest()}")
            return
        if ended != status:
            self.fail(f"the run ended with status {ended}, not {status}")
        _wait_for(lambda: not self.targets.commands(), 10.0)
        if left := self.targets.commands():
            self.fail(f"processes outlive the run: {left}")

    def fail(self, why: str) -> None:
        words = [f"{path.name}: {_tail(path)}" for path in self._logs()]
        raise DrillFailed("\n".join([why, f"warnings: {self.watcher.warnings[-10:]}", *words]))

    def _logs(self) -> list[Path]:
        return sorted([*self.run_folder.parents[1].glob("*.txt"), *self.run_folder.glob("logs/*")])


@contextmanager
def started(folder: Path, plan: Plan) -> Iterator[StartedRun]:
    """A run on a small disk behind a proxy; whatever happens, no process is left in the end."""
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
            targets.end_all()


def _open(targets: Targets, *arguments: str) -> subprocess.Popen[bytes]:
    """`speed-async train` in a session of its own, in the folder that marks its processes."""
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
    """Free now, and outside of the range that the system gives to connections: a service that is
    started again finds its port."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise DrillFailed("no free ports between 20000 and 32000")


def _wait_for(happened: Callable[[], bool], timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    while not happened() and time.monotonic() < ends_s:
        time.sleep(0.05)


def _tail(path: Path, num_lines: int = 12) -> str:
    return "\n  ".join(path.read_text(errors="replace").splitlines()[-num_lines:])
