"""Supervision of one actor, a child process that may die, hang or be stopped.

consumes   the exit of the child, the end of the run, a stop signal
restarts   a child that was killed by a signal or declared lost, with back-off; an actor that
           failed with an error is not restarted, because it would fail again
ends       the child shortly after the end of the run, even if it hangs; a draining child
           immediately if the service is gone
"""

import asyncio
import contextlib
import signal
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_async.config.schema import Config
from speed_async.errors import RoleError, SpeedAsyncError
from speed_async.launcher.exit_status import EXIT_INCARNATION_LOST, recorded
from speed_async.launcher.ports import listens
from speed_async.launcher.processes import kill_process, start_role
from speed_async.launcher.roles.join import RunEnd
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport import messages as m

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
HEALTHY_S = 10.0
"""After an actor has run for this long, its back-off is reset."""
END_GRACE_S = 6.0
"""After the end of the run, its drained actors have this long to free their engines."""
SERVICE_GRACE_S = 1.0
"""When the service does not accept connections any more, the end event must arrive within this;
otherwise the service has died."""
PROBE_INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPlan:
    """Parameters of the actor that a supervisor starts."""

    index: int
    host: str
    port: int
    """Port of the service."""
    folder: Path
    """A run folder for logs and error files."""
    config: Path | None = None
    """The actor's configuration; None means that of the run folder."""
    first_incarnation: int = 0
    joined: bool = False
    """It joined with `--join`: it has no rank, and its failure does not end the run."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def role(self) -> str:
        return f"actor-{self.index}"

    def arguments(self, incarnation: int) -> list[str]:
        config = self.config or RunFolder(path=self.folder).config
        arguments = ["--config", str(config), "--run-folder", str(self.folder)]
        arguments += ["--host", self.host, "--port", str(self.port)]
        arguments += ["--index", str(self.index), "--incarnation", str(incarnation)]
        return [*arguments, "--joined"] if self.joined else arguments


async def supervise(
    config: Config,
    plan: ActorPlan,
    *,
    stopping: asyncio.Event,
    run_over: Coroutine[Any, Any, RunEnd],
    report: Callable[[m.ActorExited], Awaitable[None]],
) -> RunEnd | None:
    """Run one actor until it has drained, `stopping` is set, or `run_over` returns.

    `report` tells the service at once that the actor has died and is restarted.

    Returns how the run ended; None if only this actor ended or the end of the run is not known.
    Raises RoleError with the actor's message, or any error of `run_over`.
    """
    over = asyncio.create_task(run_over, name="run-over")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    try:
        await _supervise(config, plan, over, stop, report)
        if not stop.done():  # the actor has drained; the end event may still be in transit
            await asyncio.wait((over, stop), timeout=END_GRACE_S, return_when=FIRST_COMPLETED)
        return await over if over.done() else None
    finally:
        over.cancel()
        stop.cancel()


async def _supervise(
    config: Config,
    plan: ActorPlan,
    over: asyncio.Task[RunEnd],
    stop: asyncio.Task[Any],
    report: Callable[[m.ActorExited], Awaitable[None]],
) -> None:
    folder, role = RunFolder(path=plan.folder), plan.role
    max_restarts, status, backoff_s = config.actors.max_restarts, 0, FIRST_BACKOFF_S
    for incarnation in range(plan.first_incarnation, plan.first_incarnation + max_restarts + 1):
        folder.error(role).unlink(missing_ok=True)
        process = await start_role(
            "actor",
            plan.arguments(incarnation),
            log=folder.log(role),
            stdout=asyncio.subprocess.DEVNULL,
            environment=plan.environment,
        )
        started_s = asyncio.get_running_loop().time()
        ended = asyncio.create_task(process.wait(), name="child")
        await asyncio.wait((ended, over, stop), return_when=FIRST_COMPLETED)
        if stop.done() and not ended.done():
            await _drain(process, ended, over, plan, config.cluster.drain_timeout_s)
        elif over.done():
            await asyncio.wait((ended,), timeout=END_GRACE_S)
            await kill_process(process)
        status = await ended
        if status == 0 or over.done() or stop.done():
            return
        if status > 0 and status != EXIT_INCARNATION_LOST:
            text = recorded(folder.error(role)) or f"{role}: exit status {status}"
            raise RoleError.from_text(text)
        how = f"died ({_describe_status(status)}, log: {folder.log(role)})"
        exited = m.ActorExited(role=role, incarnation=incarnation, how=how)
        with contextlib.suppress(SpeedAsyncError):  # the service may be restarting
            await report(exited)
        if asyncio.get_running_loop().time() - started_s > HEALTHY_S:
            backoff_s = FIRST_BACKOFF_S
        await asyncio.wait((over, stop), timeout=backoff_s, return_when=FIRST_COMPLETED)
        if over.done() or stop.done():
            return
        backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
    last_error = recorded(folder.error(role)) or f"see {folder.log(role)}"
    raise RoleError(
        role,
        f"died {max_restarts + 1} times, which exceeds actors.max_restarts = {max_restarts} "
        f"(last: {_describe_status(status)}): {last_error}",
    )


async def _drain(
    process: asyncio.subprocess.Process,
    ended: asyncio.Task[int],
    over: asyncio.Task[RunEnd],
    plan: ActorPlan,
    timeout_s: float,
) -> None:
    """Let the child drain for at most `timeout_s`, while the service accepts connections."""
    process.send_signal(signal.SIGTERM)
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    while not ended.done() and loop.time() < ends_s:
        if not await listens(plan.host, plan.port, timeout_s=SERVICE_GRACE_S):
            await asyncio.wait((ended, over), timeout=SERVICE_GRACE_S, return_when=FIRST_COMPLETED)
            if over.done():
                await asyncio.wait((ended,), timeout=END_GRACE_S)
            break
        await asyncio.wait((ended,), timeout=PROBE_INTERVAL_S)
    await kill_process(process)


def _describe_status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
