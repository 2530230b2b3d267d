"""The console command: keys on a real terminal, and run folders."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from speed_async.config.load import build_config, save_config
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import JsonlSink
from speed_async.transport.feed import FeedPublisher
from tests.fakes.panel_samples import SAMPLE
from tests.fakes.panel_states import EVALUATION, GAUGES
from tests.fakes.paths import MODEL
from tests.fakes.run_process import free_port
from tests.fakes.terminals import read_until, take_terminal

DEADLINE_S = 120.0
COMMAND = [sys.executable, "-m", "speed_async", "console"]
BUSY = Event(kind="status", values=GAUGES | {"phase": "training"})


class Terminal:
    """A terminal of 80 x 24 and a process in its foreground."""

    def __init__(self, command: list[str]) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        self.seen = b""
        self._pending = b""
        """Output that was read but not consumed."""

    def wait_for(self, text: str) -> None:
        """Wait until new output contains this text."""
        awaited = text.encode()
        if awaited not in self._pending:
            try:
                self._pending += read_until(self.master, awaited, deadline_s=DEADLINE_S)
            except AssertionError as late:
                raise AssertionError(f"{text!r} was not shown: {str(late)[-3000:]}") from None
        before, found, self._pending = self._pending.partition(awaited)
        self.seen += before + found

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.modes

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def terminal(command: list[str]) -> Iterator[Terminal]:
    opened = Terminal(command)
    try:
        yield opened
    finally:
        opened.close()


def with_feed(check: Callable[[int], None], *events: Event) -> None:
    """Run `check` with the port of a feed that publishes these events repeatedly."""

    async def publish() -> None:
        feed = FeedPublisher("127.0.0.1", 0)
        running = asyncio.create_task(asyncio.to_thread(check, feed.port))
        start_s = asyncio.get_running_loop().time()
        try:
            while not running.done():
                at_s = asyncio.get_running_loop().time() - start_s
                for event in events:
                    wall_s = {"wall_s": 62.0 + at_s} if event.kind == "status" else {}
                    await feed.publish(Event(kind=event.kind, values=event.values | wall_s))
                await asyncio.wait((running,), timeout=0.05)
            await running
        finally:
            await feed.close()

    asyncio.run(publish())


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


# --- keys ---------------------------------------------------------------------------------------


def test_keys_show_help_and_samples_and_q_restores_the_terminal() -> None:
    def check(port: int) -> None:
        with terminal([*COMMAND, f"tcp://127.0.0.1:{port}"]) as shown:
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_restored)
            shown.press("h")
            shown.wait_for("page 1 of")
            shown.press("s")
            shown.wait_for("TRUNCATED")
            shown.press("s")
            shown.wait_for("12/100")
            shown.press("?")
            shown.wait_for("page 1 of")
            shown.press("q")
            shown.wait_for("the console is closed; the run continues")
            assert shown.process.wait(DEADLINE_S) == 0
            assert shown.is_restored
            assert shown.seen.rfind(b"\x1b[?25h") > shown.seen.rfind(b"\x1b[?25l")

    with_feed(check, BUSY, Event(kind="sample", values=SAMPLE))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_signals_restore_the_terminal(ending: signal.Signals) -> None:
    def check(port: int) -> None:
        with terminal([*COMMAND, f"tcp://127.0.0.1:{port}"]) as shown:
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_restored)
            if ending == signal.SIGINT:
                shown.press("\x03")  # the terminal converts it to a signal in this mode too
            else:
                shown.process.send_signal(ending)
            assert eventually(lambda: shown.is_restored)
            shown.wait_for("\x1b[?25h")
            shown.process.wait(DEADLINE_S)

    with_feed(check, BUSY)


CONSOLE_OF_A_RUN = """
import asyncio, os, signal, sys
from speed_async.launcher.roles.console_role import Source, run_console
from speed_async.launcher.processes import die_with_parent
die_with_parent(int(sys.argv[2]), signal.SIGTERM)
asyncio.run(run_console(Source(host="127.0.0.1", port=int(sys.argv[1]), title="demo")))
"""
LEARNER = f"""
import os, subprocess, sys
command = [sys.executable, "-c", {CONSOLE_OF_A_RUN!r}, sys.argv[1], str(os.getpid())]
subprocess.run(command, start_new_session=True)
"""
LAUNCHER = f"""
import subprocess, sys
from speed_async.observability.panel.keyboard import preserve_terminal
with preserve_terminal():
    command = [sys.executable, "-c", {LEARNER!r}, sys.argv[1]]
    learner = subprocess.Popen(command, start_new_session=True)
    print("learner", learner.pid, flush=True)
    learner.wait()
print("launcher done", flush=True)
"""


def test_console_of_a_run_reads_keys_from_its_own_session() -> None:
    def check(port: int) -> None:
        with terminal([sys.executable, "-c", LAUNCHER, str(port)]) as shown:
            shown.wait_for("12/100")
            shown.wait_for("h help")
            assert eventually(lambda: not shown.is_restored)
            shown.press("h")
            shown.wait_for("page 1 of")
            shown.press("q")
            shown.wait_for("the panel is closed; the run continues, and Ctrl-C stops it")
            shown.wait_for("start v12")
            assert eventually(lambda: shown.is_restored)

    with_feed(check, BUSY)


def test_killed_learner_restores_the_terminal() -> None:
    def check(port: int) -> None:
        with terminal([sys.executable, "-c", LAUNCHER, str(port)]) as shown:
            shown.wait_for("12/100")
            learner = int(shown.seen.partition(b"learner ")[2].split()[0])
            assert eventually(lambda: not shown.is_restored)
            os.kill(learner, signal.SIGKILL)
            shown.wait_for("launcher done")
            assert eventually(lambda: shown.is_restored)

    with_feed(check, BUSY)


SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: os.setpgid(0, 0))
print("started", flush=True)
sys.stdin.readline()
os.tcsetpgrp(0, job.pid)
job.wait()
os.tcsetpgrp(0, os.getpgrp())
print("job done", flush=True)
"""


def test_background_job_draws_nothing_until_it_is_in_the_foreground() -> None:
    """Like `speed-async console ... &` and `fg` in a shell."""

    def check(port: int) -> None:
        command = [*COMMAND, f"tcp://127.0.0.1:{port}"]
        with terminal([sys.executable, "-c", SHELL, *command]) as shown:
            shown.wait_for("started")
            with contextlib.suppress(AssertionError):
                shown.seen += read_until(shown.master, b"12/100", deadline_s=3.0)
            assert b"12/100" not in shown.seen
            assert shown.is_restored
            shown.press("\n")
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_restored)
            shown.press("q")
            shown.wait_for("job done")
            assert shown.is_restored

    with_feed(check, BUSY)


# --- folders and addresses ----------------------------------------------------------------------


def run_folder(tmp_path: Path, *events: Event, port: int | None = None) -> Path:
    folder = tmp_path / "run"
    sink = JsonlSink(folder)
    for event in events:
        sink.write(event)
    sink.close()
    tree = {
        "run": {"folder": str(folder), "updates": 100},
        "model": {"path": str(MODEL)},
        "task": {"name": "arithmetic"},
    }
    save_config(build_config(tree), folder / "config.json")
    samples = [{"kind": "sample", **SAMPLE, "prompt": f"prompt {n}"} for n in range(5)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    if port is not None:
        address = {"host": "127.0.0.1", "port": port, "feed_port": port}
        (folder / "address.json").write_text(json.dumps(address))
    return folder


def console(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )


EVALUATED = Event(kind="evaluation", values=EVALUATION)
STEP = Event(kind="step", values=GAUGES)
END = Event(
    kind="end",
    values=GAUGES | {"outcome": "stopped", "ok": False, "reason": "stopped by a signal"},
)


def test_closed_port_is_reported_immediately() -> None:
    port = free_port()
    start_s = time.monotonic()
    result = console(f"tcp://127.0.0.1:{port}")
    assert result.returncode == 1
    assert f"tcp://127.0.0.1:{port}: no process listens at this address" in result.stderr
    assert "speed-async console RUN_FOLDER" in result.stderr
    assert time.monotonic() - start_s < 25.0


def test_silent_port_is_reported_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        result = console(f"tcp://127.0.0.1:{silent_server.getsockname()[1]}")
    assert result.returncode == 1
    assert "none has arrived" in result.stderr


def test_folder_of_a_finished_run_shows_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, END, port=free_port())
    result = console(str(folder))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["start", "evaluation", "sample", "end"]
    assert lines[-1].startswith("end stopped v12 at 1m02s: stopped by a signal")
    assert 'prompt "prompt 4"' in lines[2]


def test_folder_of_a_finished_run_shows_its_end_on_a_terminal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, END, port=free_port())
    with terminal([*COMMAND, str(folder)]) as shown:
        shown.wait_for("stopped by a signal")
        assert shown.process.wait(DEADLINE_S) == 0
        assert shown.is_restored


def test_folder_of_a_lost_run_shows_the_resume_command(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, port=free_port())
    result = console(str(folder))
    assert result.returncode == 1
    assert f"the run in '{folder}' does not respond" in result.stderr
    assert "of version 12, 1m02s after its start" in result.stderr
    assert f"speed-async train --resume {folder}" in result.stderr


def test_folder_without_a_run_is_reported(tmp_path: Path) -> None:
    result = console(str(tmp_path))
    assert result.returncode == 1
    assert "is not a run folder" in result.stderr
    result = console("runs/no-such-run")
    assert result.returncode == 1
    assert "nor a folder" in result.stderr


def test_late_console_shows_earlier_events(tmp_path: Path) -> None:
    before = [
        EVALUATED,
        *(Event(kind="step", values=GAUGES | {"wall_s": float(at)}) for at in range(61)),
    ]
    end = Event(kind="end", values=END.values | {"wall_s": 64.0})

    def check(port: int) -> None:
        folder = run_folder(tmp_path, *before, port=port)
        with terminal([*COMMAND, str(folder)]) as shown:
            shown.wait_for("first 0.52")
            shown.wait_for("stopped by a signal")
            assert shown.process.wait(DEADLINE_S) == 0
        result = console(str(folder))
        assert [line.split()[0] for line in result.stdout.splitlines()][:2] == [
            "start",
            "evaluation",
        ]

    with_feed(check, Event(kind="status", values=GAUGES | {"wall_s": 63.0}), end)
