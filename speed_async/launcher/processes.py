"""Child processes that cannot outlive their parent, and are ended within a deadline."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from speed_async.launcher.logs import QUIET

PR_SET_PDEATHSIG = 1
ENVIRONMENT = {
    # Roles set their own thread counts; OpenMP's spinning threads would fight over the cores.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Gloo reports peers that left on stderr, in C++ stack traces; our errors say it in words.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    **QUIET,
}
"""What a command that starts roles sets for them, where the user has not."""


def die_with_parent(parent_id: int | None, how: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux): when the thread that
    started it does, which is its parent's main thread everywhere here.

    `parent_id`: who the parent was when this process was started, to notice a parent that has ended
    already; None where nobody told.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
        if parent_id is not None and os.getppid() != parent_id:
            os._exit(1)


async def start_role(
    role: str,
    arguments: Sequence[str],
    *,
    log: Path,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int | None = asyncio.subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> asyncio.subprocess.Process:
    """Start `python -m speed_async.launcher.child ROLE ...` in a session of its own.

    A session of its own keeps the terminal's Ctrl-C away from it: roles end by protocol.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "speed_async.launcher.child",
            role,
            "--parent",
            str(os.getpid()),
            *arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=file,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )


async def kill_process(process: asyncio.subprocess.Process) -> None:
    """End the process now, unless it has ended; a stopped one as well."""
    if process.returncode is None:
        process.kill()
        await process.wait()


async def end_process(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Give the process `grace_s` to end by itself, then SIGTERM, then SIGKILL."""
    for act in (None, process.terminate, process.kill):
        if process.returncode is not None:
            return
        if act is not None:
            act()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            continue
