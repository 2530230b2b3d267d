"""CPU times of a process tree, of real processes."""

import subprocess
import sys

import pytest

from benchmarks.evidence.process_times import ProcessTimes, machine_busy_s

WORK = """
import subprocess, sys, time
def burn(seconds):
    while time.process_time() < seconds:
        pass
if len(sys.argv) > 1:
    burn(0.4)
    print("child", flush=True)
    sys.stdin.read()
else:
    child = subprocess.Popen([sys.executable, __file__, "child"], stdin=subprocess.PIPE)
    burn(0.2)
    print("parent", flush=True)
    sys.stdin.readline()
    child.communicate()
    print("ended", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_times_cover_descendants_also_after_their_exit(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    busy_s = machine_busy_s()
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        times = ProcessTimes(process.pid)
        assert {process.stdout.readline(), process.stdout.readline()} == {"parent\n", "child\n"}
        both_s = times.sample()
        assert both_s >= 0.55  # in ticks of 10 ms
        assert times.by_role() == {"launcher": both_s}
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        assert times.sample() >= both_s
        process.stdin.close()
    assert machine_busy_s() - busy_s >= 0.5
