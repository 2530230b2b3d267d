"""The console command: on a real terminal with keys, and for the folder of a run."""

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
from test_observe_panel import EVALUATION, GAUGES
from test_observe_panel_live import read_until, take_terminal
from test_observe_panel_sizes import SAMPLE

from speed_async.config.load import build_config, save_config
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import JsonlSink
from speed_async.transport.feed import FeedPublisher

DEADLINE_S = 120.0
COMMAND = [sys.executable, "-m", "speed_async", "console"]
BUSY = Event(kind="status", values=GAUGES | {"phase": "training"})
MODEL = Path(__file__).resolve().parents[1] / "quickstart" / "model"


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
        self._ahead = b""
        """Read, and not looked at yet."""

    def wait_for(self, text: str) -> None:
        """What is drawn from now on holds this text."""
        awaited = text.encode()
        if awaited not in self._ahead:
            try:
                self._ahead += read_until(self.master, awaited, deadline_s=DEADLINE_S)
            except AssertionError as late:
                raise AssertionError(f"{text!r} did not come: {str(late)[-3000:]}") from None
        before, found, self._ahead = self._ahead.partition(awaited)
        self.seen += before + found

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    @property
    def is_as_before(self) -> bool:
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


def with_feed(scene: Callable[[int], None], *events: Event) -> None:
    """Run `scene` with the port of a feed that says these events again and again."""

    async def play() -> None:
        feed = FeedPublisher("127.0.0.1", 0)
        playing = asyncio.create_task(asyncio.to_thread(scene, feed.port))
        began_s = asyncio.get_running_loop().time()
        try:
            while not playing.done():
                at_s = asyncio.get_running_loop().time() - began_s
                for event in events:
                    wall_s = {"wall_s": 62.0 + at_s} if event.kind == "status" else {}
                    await feed.publish(Event(kind=event.kind, values=event.values | wall_s))
                await asyncio.wait((playing,), timeout=0.05)
            await playing
        finally:
            await feed.close()

    asyncio.run(play())


def eventually(happened: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + DEADLINE_S
    while not happened() and time.monotonic() < ends_s:
        time.sleep(0.02)
    return happened()


# --- keys ---------------------------------------------------------------------------------------


def test_keys_turn_to_help_and_samples_and_q_leaves_the_terminal_as_it_was() -> None:
    def scene(port: int) -> None:
        with terminal([*COMMAND, f"tcp://127.0.0.1:{port}"]) as shown:
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_as_before)
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
            assert shown.is_as_before
            assert shown.seen.rfind(b"\x1b[?25h") > shown.seen.rfind(b"\x1b[?25l")

    with_feed(scene, BUSY, Event(kind="sample", values=SAMPLE))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_terminal_as_it_was(ending: signal.Signals) -> None:
    def scene(port: int) -> None:
        with terminal([*COMMAND, f"tcp://127.0.0.1:{port}"]) as shown:
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_as_before)
            if ending == signal.SIGINT:
                shown.press("\x03")  # the terminal makes a signal of it, also now
            else:
                shown.process.send_signal(ending)
            assert eventually(lambda: shown.is_as_before)
            shown.wait_for("\x1b[?25h")
            shown.process.wait(DEADLINE_S)

    with_feed(scene, BUSY)


CONSOLE_OF_A_RUN = """
import asyncio, os, signal, sys
from speed_async.launcher.roles.console_role import Source, accompany
from speed_async.launcher.processes import die_with_parent
die_with_parent(int(sys.argv[2]), signal.SIGTERM)
asyncio.run(accompany(Source(host="127.0.0.1", port=int(sys.argv[1]), title="demo")))
"""
LEARNER = f"""
import os, subprocess, sys
command = [sys.executable, "-c", {CONSOLE_OF_A_RUN!r}, sys.argv[1], str(os.getpid())]
subprocess.run(command, start_new_session=True)
"""
LAUNCHER = f"""
import subprocess, sys
from speed_async.observability.panel.keyboard import terminal_kept
with terminal_kept():
    command = [sys.executable, "-c", {LEARNER!r}, sys.argv[1]]
    learner = subprocess.Popen(command, start_new_session=True)
    print("learner", learner.pid, flush=True)
    learner.wait()
print("launcher done", flush=True)
"""


def test_the_console_of_a_run_has_keys_though_it_is_in_a_session_of_its_own() -> None:
    def scene(port: int) -> None:
        with terminal([sys.executable, "-c", LAUNCHER, str(port)]) as shown:
            shown.wait_for("12/100")
            shown.wait_for("h help")
            assert eventually(lambda: not shown.is_as_before)
            shown.press("h")
            shown.wait_for("page 1 of")
            shown.press("q")
            shown.wait_for("the panel is closed; the run continues, and Ctrl-C stops it")
            shown.wait_for("start v12")
            assert eventually(lambda: shown.is_as_before)

    with_feed(scene, BUSY)


def test_a_run_whose_learner_is_killed_leaves_the_terminal_as_it_was() -> None:
    def scene(port: int) -> None:
        with terminal([sys.executable, "-c", LAUNCHER, str(port)]) as shown:
            shown.wait_for("12/100")
            learner = int(shown.seen.partition(b"learner ")[2].split()[0])
            assert eventually(lambda: not shown.is_as_before)
            os.kill(learner, signal.SIGKILL)
            shown.wait_for("launcher done")
            assert eventually(lambda: shown.is_as_before)

    with_feed(scene, BUSY)


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


def test_a_background_job_draws_nothing_until_it_has_the_terminal() -> None:
    """As after `speed-async console ... &` and `fg` in a shell."""

    def scene(port: int) -> None:
        command = [*COMMAND, f"tcp://127.0.0.1:{port}"]
        with terminal([sys.executable, "-c", SHELL, *command]) as shown:
            shown.wait_for("started")
            with contextlib.suppress(AssertionError):
                shown.seen += read_until(shown.master, b"12/100", deadline_s=3.0)
            assert b"12/100" not in shown.seen
            assert shown.is_as_before
            shown.press("\n")
            shown.wait_for("12/100")
            assert eventually(lambda: not shown.is_as_before)
            shown.press("q")
            shown.wait_for("job done")
            assert shown.is_as_before

    with_feed(scene, BUSY)


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


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


def test_an_address_where_nobody_answers_is_told_at_once() -> None:
    port = free_port()
    began_s = time.monotonic()
    done = console(f"tcp://127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"tcp://127.0.0.1:{port}: no process listens at this address" in done.stderr
    assert "speed-async console RUN_FOLDER" in done.stderr
    assert time.monotonic() - began_s < 25.0  # it was 30 s


def test_a_port_that_accepts_and_says_nothing_is_told_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        done = console(f"tcp://127.0.0.1:{mute.getsockname()[1]}")
    assert done.returncode == 1
    assert "none has arrived" in done.stderr


def test_the_folder_of_a_run_that_is_over_shows_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, END, port=free_port())
    done = console(str(folder))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["start", "evaluation", "sample", "end"]
    assert lines[-1].startswith("end stopped v12 at 1m02s: stopped by a signal")
    assert 'prompt "prompt 4"' in lines[2]


def test_on_a_terminal_too_the_folder_of_a_run_that_is_over_shows_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, END, port=free_port())
    with terminal([*COMMAND, str(folder)]) as shown:
        shown.wait_for("stopped by a signal")
        assert shown.process.wait(DEADLINE_S) == 0
        assert shown.is_as_before


def test_the_folder_of_a_run_that_went_away_says_how_to_go_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, EVALUATED, STEP, port=free_port())
    done = console(str(folder))
    assert done.returncode == 1
    assert f"the run in '{folder}' does not respond" in done.stderr
    assert "of version 12, 1m02s after its start" in done.stderr
    assert f"speed-async train --resume {folder}" in done.stderr


def test_a_folder_that_is_none_of_a_run_is_told(tmp_path: Path) -> None:
    done = console(str(tmp_path))
    assert done.returncode == 1
    assert "is not a run folder" in done.stderr
    done = console("runs/no-such-run")
    assert done.returncode == 1
    assert "nor a folder" in done.stderr


def test_a_late_console_shows_what_happened_before_it_came(tmp_path: Path) -> None:
    before = [
        EVALUATED,
        *(Event(kind="step", values=GAUGES | {"wall_s": float(at)}) for at in range(61)),
    ]
    end = Event(kind="end", values=END.values | {"wall_s": 64.0})

    def scene(port: int) -> None:
        folder = run_folder(tmp_path, *before, port=port)
        with terminal([*COMMAND, str(folder)]) as shown:
            shown.wait_for("first 0.52")
            shown.wait_for("stopped by a signal")
            assert shown.process.wait(DEADLINE_S) == 0
        done = console(str(folder))
        assert [line.split()[0] for line in done.stdout.splitlines()][:2] == ["start", "evaluation"]

    with_feed(scene, Event(kind="status", values=GAUGES | {"wall_s": 63.0}), end)
