"""How rank processes are followed, with small commands in their place."""

import asyncio
import sys
from pathlib import Path

from speed_async.launcher.doctor.rank_output import STAGE
from speed_async.launcher.doctor.ranks import RankEnd, run_one
from speed_async.launcher.doctor.records import Exchange

HEAD = (
    ""
    "from speed_async.launcher.doctor.rank_output import print_result, print_stage\n"
    "from speed_async.launcher.doctor.records import Exchange\n"
    "print_stage('forming a gloo group')\n"
)


def follow(code: str, silence_s: float = 60.0) -> RankEnd:
    return asyncio.run(run_one([sys.executable, "-c", code], 1, silence_s=silence_s))


def test_result_is_read_among_the_output_of_libraries() -> None:
    end = follow(HEAD + "print('NCCL INFO'); print_result(Exchange(missing=[3]))")
    assert end.result == Exchange(missing=[3])


def test_failed_process_is_reported_with_its_stage_and_last_line() -> None:
    end = follow(HEAD + "raise RuntimeError('no device')")
    assert end.result is None
    where = "exited with status 1 while forming a gloo group (RuntimeError: no device): "
    assert end.fault.startswith(where)


def test_hung_process_is_killed_and_its_stage_named(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    end = follow(
        # It imports nothing large: its first line must come within the limit.
        f"import os, time\nopen({str(file)!r}, 'w').write(str(os.getpid()))\n"
        f"print({STAGE + 'measuring'!r}, flush=True)\ntime.sleep(3600)",
        silence_s=5.0,
    )
    assert end.fault.startswith("was silent for 5 s while measuring, and was killed: set a longer ")
    assert not Path(f"/proc/{file.read_text()}").exists()
