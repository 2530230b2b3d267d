"""Logs of child processes."""

import resource
import subprocess
import sys
from pathlib import Path

FULL = f"""
import resource, sys
from pathlib import Path
from speed_async.runtime.failure import record
from speed_async.runtime.processes import log_to
log_to(Path(sys.argv[1]) / "log")
resource.setrlimit(resource.RLIMIT_FSIZE, (8, {resource.RLIM_INFINITY}))
sys.stderr.write("before, and far too long\\n")
record(Path(sys.argv[1]) / "error", "actor-1", ValueError("why"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
sys.stderr.write("after\\n")
"""


def test_a_process_whose_log_has_no_room_goes_on_and_logs_again_when_there_is(
    tmp_path: Path,
) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], timeout=60)
    assert done.returncode == 0
    log = (tmp_path / "log").read_text()
    assert log.startswith("before, ")
    assert log.endswith("after\n")
    assert len(log) < 20
