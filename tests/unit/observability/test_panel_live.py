import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from speed_async.observability.metrics import Event, Value
from speed_async.observability.panel.panel import Panel, can_show
from tests.fakes.terminals import read_until, take_terminal

GAUGES: dict[str, Value] = {"wall_s": 62.0, "policy_version": 12, "phase": "training"}
EVALUATION: dict[str, Value] = {"wall_s": 62.0, "policy_version": 10, "accuracy": 0.52}


def live_console(stream: io.StringIO) -> Console:
    return Console(file=stream, width=80, height=24, force_terminal=True, _environ={})


def test_fast_gauges_share_frames_and_frames_are_complete() -> None:
    stream = io.StringIO()
    with Panel(live_console(stream), "demo") as panel:
        for hundredth in range(100):  # one second of a status every 10 ms
            panel.update(Event(kind="status", values=GAUGES | {"wall_s": hundredth / 100}))
        panel.update(Event(kind="status", values=GAUGES | {"wall_s": 0.99, "phase": "draining"}))
        during = stream.getvalue()
    frames = re.findall(r"\x1b\[\?2026h(.*?)\x1b\[\?2026l", during, flags=re.DOTALL)
    assert 9 <= len(frames) <= 11
    assert all(frame.count("╭") == frame.count("╰") == 1 for frame in frames)
    assert "draining" not in during
    assert "draining" in stream.getvalue()


def test_evaluations_and_the_end_are_drawn_immediately() -> None:
    stream = io.StringIO()
    with Panel(live_console(stream), "demo") as panel:
        panel.update(Event(kind="status", values=GAUGES))
        panel.update(Event(kind="evaluation", values=EVALUATION))
        assert "held-out 0.520 at v10" in stream.getvalue()
        panel.update(Event(kind="end", values={"wall_s": 62.0, "ok": True, "reason": "all done"}))
        assert "finished: all done" in stream.getvalue()


def test_panel_requires_a_capable_terminal() -> None:
    stream = io.StringIO()
    assert can_show(live_console(stream))
    assert not can_show(Console(file=stream))
    assert not can_show(Console(file=stream, force_terminal=True, width=40, _environ={}))
    assert not can_show(Console(file=stream, force_terminal=True, _environ={"TERM": "dumb"}))


IN_A_TERMINAL = """
import os, sys, time
from rich.console import Console
from speed_async.observability.metrics import Event
from speed_async.observability.panel.panel import Panel
with Panel(Console(width=80, height=24), "demo") as panel:
    panel.update(Event(kind="status", values={"wall_s": 1.0, "phase": "training"}))
    if sys.argv[1] == "raise":
        raise RuntimeError("boom")
    # From now on the interrupt arrives during the sleep, not during drawing.
    os.write(int(sys.argv[2]), b"drawn")
    time.sleep(30)
"""


@pytest.mark.parametrize("ending", ["raise", "interrupt"])
def test_terminal_is_restored_after_an_error_and_an_interrupt(ending: str) -> None:
    master, slave = pty.openpty()
    drawn, draws = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, ending, str(draws)],
        pass_fds=(draws,),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=take_terminal,
    ) as process:
        try:
            output = read_until(master, b"training", deadline_s=120.0)
            if ending == "interrupt":
                read_until(drawn, b"drawn", deadline_s=120.0)
                assert not termios.tcgetattr(slave)[3] & termios.ECHO
                process.send_signal(signal.SIGINT)
            last_text = b"boom" if ending == "raise" else b"KeyboardInterrupt"
            output += (
                read_until(master, last_text, deadline_s=120.0) if last_text not in output else b""
            )
            process.wait(timeout=120.0)
            assert termios.tcgetattr(slave)[3] & termios.ECHO
        finally:
            process.kill()
            for descriptor in (master, slave, drawn, draws):
                os.close(descriptor)
    frame, after = output.rsplit(b"\x1b[?25h", 1)
    assert b"\x1b[?25l" in frame
    assert b"\x1b[?25l" not in after
    assert frame.rstrip().endswith("╯".encode() + b"\x1b[0m")
    assert last_text in after
