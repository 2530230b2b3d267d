"""A process whose threads are blocked ends in time after an error."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys, time
from speed_async.launcher.event_loop import ending_in_time, run

async def fail():
    if {blocks}:
        asyncio.create_task(asyncio.to_thread(time.sleep, 600))
        await asyncio.sleep(0)
    raise ValueError("the rank is gone")

def end(error):
    print("reported:", error)
    return 7

try:
    run(ending_in_time(fail(), grace_s={grace_s}, end=end))
except ValueError as error:
    print("raised:", error)
    sys.exit(8)
"""


@pytest.mark.parametrize(
    ("blocks", "grace_s", "status", "text"),
    [(True, 0.5, 7, "reported"), (False, 300.0, 8, "raised")],
)
def test_failed_process_waits_for_its_threads_only_for_the_grace_time(
    blocks: bool, grace_s: float, status: int, text: str
) -> None:
    program = PROGRAM.format(blocks=blocks, grace_s=grace_s)
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=120, stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout) == (status, f"{text}: the rank is gone\n")
