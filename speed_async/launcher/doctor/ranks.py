"""Starts the rank processes of this node, and collects their results. Does not import torch.

A process that is silent for too long is killed: a hung rank must not hang the command.
"""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass

from speed_async.launcher.doctor.rank_output import read_result, read_stage
from speed_async.launcher.doctor.records import JOB, Exchange, RankJob
from speed_async.launcher.processes import ENVIRONMENT, kill_process

MODULE = "speed_async.launcher.doctor.rank_process"
LOADING_S = 60.0
"""In addition to the waits of one stage: to load PyTorch on a busy machine."""
MAX_LINE_BYTES = 1 << 24
MAX_STDERR_CHARS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnd:
    """How a rank process of this node ended."""

    rank: int
    result: Exchange | None = None
    fault: str = ""
    """Why there is no result."""


def run_jobs(jobs: Sequence[RankJob], listener: socket.socket | None) -> list[RankEnd]:
    """Run one process per job, and return their ends in the same order.

    `listener`: the socket of the store, which the process of rank 0 inherits.
    """

    async def run_all() -> list[RankEnd]:
        silence_s = LOADING_S + 3 * jobs[0].timeout_s
        commands = [[sys.executable, "-m", MODULE, JOB.dump_json(job).decode()] for job in jobs]
        handed = [listener.fileno()] if listener is not None else []
        running = [
            run_one(
                command,
                job.rank,
                silence_s=silence_s,
                descriptors=handed if job.listener is not None else [],
            )
            for job, command in zip(jobs, commands, strict=True)
        ]
        return await asyncio.gather(*running)

    return asyncio.run(run_all())


async def run_one(
    command: Sequence[str], rank: int, *, silence_s: float, descriptors: Sequence[int] = ()
) -> RankEnd:
    """Run one rank process; kill it when it prints no line for `silence_s`."""
    # In its own session it does not receive the terminal's Ctrl-C; this process kills it.
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        limit=MAX_LINE_BYTES,
        env=ENVIRONMENT | dict(os.environ),
        pass_fds=descriptors,
        start_new_session=True,
    )
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read(), name=f"stderr of rank {rank}")
    try:
        return await _follow(process, rank, errors, silence_s)
    finally:
        await kill_process(process)
        errors.cancel()


async def _follow(
    process: Process, rank: int, errors: "asyncio.Task[bytes]", silence_s: float
) -> RankEnd:
    assert process.stdout is not None
    stage = "starting"
    while True:
        try:
            raw = await asyncio.wait_for(process.stdout.readline(), silence_s)
        except TimeoutError:
            fault = (
                f"was silent for {silence_s:g} s while {stage}, and was killed: set a longer "
                "--timeout on a slow machine, else look for a driver or disk that hangs (dmesg)"
            )
            return RankEnd(rank=rank, fault=fault)
        line = raw.decode(errors="replace")
        if not raw:
            status = await process.wait()
            last = _last_line(await errors)
            fault = f"exited with status {status} while {stage} ({last})"
            return RankEnd(rank=rank, fault=f"{fault}: `python -c 'import torch'` must work here")
        stage = read_stage(line) or stage
        if (result := read_result(line)) is not None:
            return RankEnd(rank=rank, result=result)


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][-MAX_STDERR_CHARS:] if lines else "it printed no error"
