"""Logs of child processes."""

import re
import resource
import subprocess
import sys
from pathlib import Path

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
FULL = f"""
import resource, sys
from pathlib import Path
from speed_async.launcher.exit_status import record
from speed_async.launcher.logs import log_to
log_to(Path(sys.argv[1]) / "log")
resource.setrlimit(resource.RLIMIT_FSIZE, (8, {resource.RLIM_INFINITY}))
sys.stderr.write("before, and far too long\\n")
record(Path(sys.argv[1]) / "error", "actor-1", ValueError("why"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
sys.stderr.write("after\\n")
"""


def test_process_survives_a_full_disk_and_logs_again_when_space_is_free(
    tmp_path: Path,
) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], timeout=240)
    assert done.returncode == 0
    log = (tmp_path / "log").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-" + rf"{STAMP} INFO    after\n", log)


LOGGING = """
import logging, sys, warnings
from pathlib import Path
from speed_async.launcher.exit_status import record
from speed_async.launcher.logs import log_to
log_to(Path(sys.argv[1]) / "log")
print("one", "line", file=sys.stderr)
sys.stderr.write("half a line, ")
sys.stderr.write("and its end\\nand another\\n")
sys.stderr.write("(EngineCore pid=12) INFO 11-29 02:13:00 [core.py:1] has both\\n")
logging.getLogger("a.package").warning("a record")
warnings.warn("a warning")
try:
    raise ValueError("why")
except ValueError as error:
    record(Path(sys.argv[1]) / "error", "actor-1", error)
from tqdm import tqdm
from transformers.utils.logging import tqdm as bar
for _ in tqdm(range(3)): pass
for _ in bar(range(3), desc="Loading weights"): pass
"""


def test_every_log_line_has_time_and_level_and_progress_bars_are_omitted(
    tmp_path: Path,
) -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING, str(tmp_path)], timeout=120)
    assert done.returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    unstamped = [re.sub(rf"^{STAMP} ", "", line) for line in lines]
    assert unstamped[:4] == [
        "INFO    one line",
        "INFO    half a line, and its end",
        "INFO    and another",
        "(EngineCore pid=12) INFO 11-29 02:13:00 [core.py:1] has both",
    ]
    assert unstamped[4] == "WARNING a.package: a record"
    assert unstamped[5].startswith("WARNING py.warnings: ")
    assert "ERROR   ValueError: why" in unstamped
    assert [line for line in lines if "%|" in line or "\r" in line] == []
    stamped = [line for line in lines if re.match(rf"{STAMP} (INFO|WARNING|ERROR) ", line)]
    assert len(stamped) == len(lines) - 1
