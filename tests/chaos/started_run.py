"""A run with everything around it that a drill needs, and no trace of it afterwards."""

import os
import random
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
from speed_async.observe.metrics import Event

END_DEADLINE_S = 300.0


class DrillFailed(AssertionError):
    """The run did not keep its promises; the text says which, and where to look."""


@dataclass(kw_only=True)
class StartedRun:
    plan: Plan
    process: subprocess.Popen[str]
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
            if self.is_over():
                return
            if time.monotonic() > ends_s:
                latest = self.watcher.latest()
                there = sorted(self.targets.all())
                self.fail(f"not whole within {timeout_s:.0f} s: {there}, {latest}")

    def is_over(self) -> bool:
        """Whether the run has ended. Raises DrillFailed when it did not end well."""
        status = self.process.poll()
        if status:
            self.fail(f"the run ended with status {status}")
        return status == 0

    def await_end(self) -> None:
        try:
            self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.fail(
                f"no end within {END_DEADLINE_S:.0f} s; the latest is {self.watcher.latest()}"
            )
        self.is_over()
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
        with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "speed_async", "train", str(config)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: targets.mark},
            )
        try:
            injector = Injector(
                targets=targets,
                proxy=proxy,
                disk=disk,
                run_folder=run_folder,
                num_actors=plan.num_actors,
                peer_timeout_s=PEER_TIMEOUT_S,
            )
            yield StartedRun(
                plan=plan,
                process=process,
                targets=targets,
                watcher=watcher,
                injector=injector,
                run_folder=run_folder,
                trace_folder=trace_folder,
            )
        finally:
            process.kill()
            process.wait()
            targets.end_all()


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
