"""Closed, broken and blocked standard streams of real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.run_process import write_config

WRITES = """
import sys
from speed_async.launcher import standard_streams
standard_streams.WRITE_DEADLINE_S = float(sys.argv[1])
sys.stderr.write(str(standard_streams.write_stream("x" * int(sys.argv[2]))))
"""
CLOSED = 'exec "$@" <&- >&- 2>&-'


def test_closed_streams_are_opened_and_open_streams_are_unchanged(tmp_path: Path) -> None:
    code = (
        "from speed_async.launcher.standard_streams import open_standard_streams as o; o(); o()\n"
        "import os, socket; s = socket.socket(); print('lost'); import sys\n"
        f"open({str(tmp_path / 'found')!r}, 'w').write(\n"
        "    repr([os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)] + [s.fileno() > 2]))"
    )
    done = subprocess.run(["sh", "-c", CLOSED, "sh", sys.executable, "-c", code], timeout=240)
    assert done.returncode == 0
    assert (tmp_path / "found").read_text() == repr(["/dev/null"] * 3 + [True])
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=240)
    assert done.stdout == b"lost\n"


@pytest.mark.parametrize(("num_bytes", "written"), [(1, True), (10_000_000, False)])
def test_write_stream_times_out_if_the_reader_does_not_read(num_bytes: int, written: bool) -> None:
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", WRITES, "60" if written else "0.2", str(num_bytes)],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=240,
        )
        assert (done.returncode, done.stderr.decode()) == (0, str(written))
    finally:
        os.close(reading)
        os.close(writing)


def test_command_exits_quietly_when_its_reader_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "speed_async", "config", str(write_config(tmp_path))]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=240)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_write_stream_without_a_reader_returns_false() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", WRITES, "60", "1"],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=240,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"False")
