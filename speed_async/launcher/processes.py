"""Child processes that exit with their parent and are terminated within a deadline."""

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
    # Roles set their own thread counts; OpenMP's spinning threads would compete for the cores.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Gloo prints C++ stack traces about lost peers to stderr; the errors here cover that.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    **QUIET,
}
"""Default environment of the roles; variables that the user has set take precedence."""


def die_with_parent(parent_id: int | None, how: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `how` when its parent exits (Linux). The kernel
    acts on the exit of the thread that started the process; here this is always the main thread.

    `parent_id`: process id of the parent at the start, to detect that it has already exited; None
    if not known.
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
    """Start `python -m speed_async.launcher.child ROLE ...` in its own session.

    In its own session a role does not receive the terminal's Ctrl-C: roles are stopped by protocol.
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
    """Kill the process unless it has exited; also works on a stopped (SIGSTOP) process."""
    if process.returncode is None:
        process.kill()
        await process.wait()


async def end_process(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Wait `grace_s` for the process to exit, then again after SIGTERM and after SIGKILL."""
    for send_signal in (None, process.terminate, process.kill):
        if process.returncode is not None:
            return
        if send_signal is not None:
            send_signal()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            continue
