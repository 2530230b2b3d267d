"""Starts whole runs as real processes and observes them through their run folder."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_async.launcher.ports import host_and_port
from speed_async.transport.feed import FeedSubscriber
from speed_async.weight_sync import network_device
from tests.fakes.paths import MODEL, REPOSITORY

DEADLINE_S = 240.0
"""Deadline of every wait; reached only on a failure."""

POLL_S = 0.2
"""Each poll reads the metrics of the run from the start: it must not take its CPU time."""

EMPTY: Mapping[str, str] = {}

SMALL = """
algorithm = "speed-rloo"
[run]
folder = "run"
updates = 3
[model]
path = "{model}"
[task]
name = "arithmetic"
max_digits = 4
num_prompts = 512
num_held_out = 8
[gate]
n_init = 2
n_cont = 2
[actors]
slots = 16
max_new_tokens = 8
[learner]
groups_per_update = 2
lr = 1e-4
[evaluate]
every = 0
[cluster]
drain_timeout_s = 10
connect_timeout_s = 120
"""


@dataclass(kw_only=True)
class Run:
    """A started run. The test has to terminate its process group."""

    process: subprocess.Popen[str]
    folder: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        # The text after the last newline is still being written.
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def wait_for(self, what: str, happened: Callable[[], object]) -> None:
        """Poll until it has happened; fails when the run ends or the deadline passes first."""
        ends_s = time.monotonic() + DEADLINE_S
        while not happened():
            assert self.process.poll() is None, f"the run ended before {what}: {self.finish()}"
            assert time.monotonic() < ends_s, f"no {what} within {DEADLINE_S} s"
            time.sleep(POLL_S)

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"{count} updates", lambda: len(self.events("step")) >= count)

    def finish(self, within_s: float = DEADLINE_S) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        try:
            out, err = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, err

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the group in the terminal's foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def processes(self) -> dict[int, str]:
        """Command lines of this run's processes by process id, without zombies."""
        mark = str(self.folder.parent)
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if mark in command:
                found[int(entry.name)] = command
        return found

    def wait_for_no_process(self) -> None:
        """Wait until no process is left; the kernel kills children shortly after their parent."""
        ends_s = time.monotonic() + DEADLINE_S
        while left := self.processes():
            assert time.monotonic() < ends_s, f"still running: {left}"
            time.sleep(POLL_S)

    def child(self, role: str, index: int | None = None) -> int:
        """Process id of a role's child process, of actor `index` if given. The role `engine` is
        the child of an actor."""
        marks = ["launcher.child " + ("actor" if role == "engine" else role)]
        marks += [f"--index {index} "] if index is not None else []
        commands = self.processes().items()
        found = [pid for pid, command in commands if all(mark in command for mark in marks)]
        [child] = [pid for pid in found if (parent_of(pid) in found) == (role == "engine")]
        return child

    def learner(self) -> int:
        """Process id of the first learner rank."""
        return parent_of(self.child("service"))

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        for process_id, command in self.processes().items():
            if "speed_async.launch " in command:
                variables = Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return process_id
        raise AssertionError(f"rank {rank} is not running")

    def kill(self) -> None:
        """Kill every process of the run at once, like a power failure."""
        for process_id in (self.process.pid, *self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.process.wait()

    def kill_learner(self) -> None:
        os.kill(self.learner(), signal.SIGKILL)

    def kill_launcher(self) -> None:
        """Kill the process that started the ranks, and wait until they have drained and ended."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()  # their output has no reader
        self.wait_for_no_process()

    def versions(self) -> list[int]:
        """Policy versions of the reported updates, in order."""
        return [event["policy_version"] for event in self.events("step")]

    def wait_for_version(self, version: int) -> None:
        self.wait_for(f"version {version}", lambda: max(self.versions(), default=0) >= version)

    def attempt(self) -> int:
        """0 for the first start of the ranks; each restart or resume adds one."""
        return json.loads((self.folder / "attempt.json").read_text())["attempt"]

    def assert_saved(self) -> None:
        """It has ended with a summary, a balanced ledger and a checkpoint of its last version."""
        summary = self.summary()
        assert summary["ledger"]["closes"] is True
        saved = self.folder / "checkpoints" / f"version-{summary['policy_version']:06d}"
        assert (saved / "SHA256SUMS").is_file()

    def address(self, after: str) -> str:
        """tcp://HOST:PORT in the learner's log after this text."""
        log = (self.folder / "logs" / "learner.log").read_text()
        return next(line for line in log.splitlines() if after in line).split()[-1]

    def endpoint(self, after: str) -> tuple[str, int]:
        """Host and port in the learner's log after this text."""
        return host_and_port(self.address(after))

    def wait_for_event(self, what: str, happened: Callable[[dict[str, Any]], object]) -> None:
        """Follow the metrics feed until `happened` is true of an event's values."""

        async def follow() -> None:
            feed = FeedSubscriber(*self.endpoint("metrics feed at"))
            try:
                while not happened((await feed.receive(DEADLINE_S)).values):
                    assert self.process.poll() is None, f"the run ended before {what}"
            finally:
                await feed.close()

        asyncio.run(asyncio.wait_for(follow(), DEADLINE_S))


def parent_of(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])


def own_address() -> str:
    """A non-loopback address of this machine, or 127.0.0.1 if there is none."""
    try:
        return network_device.own_address("192.0.2.1")
    except OSError:
        return "127.0.0.1"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def write_config(folder: Path, text: str = SMALL, model: Path = MODEL) -> Path:
    path = folder / "config.toml"
    path.write_text(text.format(model=model))
    return path


def train_command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "speed_async", "train", str(config), *overrides]


def start_train(folder: Path, *overrides: str, config: Path | None = None) -> Run:
    """Start `speed-async train` in `folder`."""
    return start(folder, train_command(config or write_config(folder), *overrides))


def copied(run: Run, folder: Path) -> Run:
    """A copy in `folder` of a run that has ended, with everything beside its run folder."""
    shutil.copytree(run.folder.parent, folder, dirs_exist_ok=True)
    return Run(process=run.process, folder=folder / run.folder.name)


def resume_train(run: Run, *overrides: str) -> Run:
    """Start `speed-async train --resume` of a run that has ended."""
    command = [sys.executable, "-m", "speed_async", "train", "--resume", str(run.folder)]
    return start(run.folder.parent, [*command, *overrides])


def start_torchrun(
    folder: Path,
    nproc: int,
    *overrides: str,
    max_restarts: int = 0,
    resume: bool = False,
    torchrun: Sequence[str] = (),
) -> Run:
    """`torchrun`: further options of torchrun."""
    config = write_config(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *torchrun]
    command += ["--max-restarts", str(max_restarts), "-m", "speed_async.launch"]
    command += ["--resume", str(folder / "run")] if resume else [str(config)]
    return start(folder, [*command, *overrides])


def start_actor(run: Run, *options: str) -> Run:
    """Start `speed-async actor --join` in the parent of the run folder."""
    command = [sys.executable, "-m", "speed_async", "actor"]
    command += ["--join", run.address("actors join at"), *options]
    return Run(process=_open(run.folder.parent, command), folder=run.folder)


def start(folder: Path, command: list[str], environment: Mapping[str, str] = EMPTY) -> Run:
    """Start a command that makes the run folder `folder`/run."""
    return Run(process=_open(folder, command, environment), folder=folder / "run")


def _open(
    folder: Path, command: list[str], environment: Mapping[str, str] = EMPTY
) -> subprocess.Popen[str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]  # parts of tasks under tests/
    python = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **python, "OMP_NUM_THREADS": "1", **environment},
    )
