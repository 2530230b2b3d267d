"""Supervision of one actor: a child process that may die, hang, or be told to stop.

consumes   the child's exit, the end of the run, a stop signal
restarts   a child that was killed by a signal or given up as lost, with back-off; an actor that
           failed with an error of its own is not started again, because it would fail again
ends       the child a moment after the run, also one that hangs; a child that drains towards a
           service that is gone at once
"""

import asyncio
import signal
from asyncio import FIRST_COMPLETED
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_async.config.schema import Config
from speed_async.errors import RoleError
from speed_async.launcher.exit_status import EXIT_GIVEN_UP, recorded
from speed_async.launcher.ports import listens
from speed_async.launcher.processes import kill_process, start_role
from speed_async.launcher.roles.join import RunEnd
from speed_async.launcher.run_folder import RunFolder

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
WELL_S = 10.0
"""An actor that lived for this long is started again at once: it is not what it does that kills
it."""
OVER_GRACE_S = 6.0
"""After the run's end its actors, long drained, have this long to free their engines."""
GONE_GRACE_S = 1.0
"""A service that nobody listens for any more has either ended the run, which is heard within this,
or died."""
PROBE_INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPlan:
    """What a supervisor starts, and where."""

    index: int
    host: str
    port: int
    """Of the service."""
    folder: Path
    """A run folder: it takes logs and errors."""
    config: Path | None = None
    """The actor's configuration; None is the run folder's."""
    first_incarnation: int = 0
    joined: bool = False
    """It came by itself: no rank, and its failure is no matter for the others."""
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
) -> RunEnd | None:
    """Run one actor until it drained, `stopping` is set, or `run_over` returns.

    How the run ended; None where only this actor did, or nobody told. Raises RoleError with the
    actor's own words, or what `run_over` raises.
    """
    over = asyncio.create_task(run_over, name="run-over")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    try:
        await _supervise(config, plan, over, stop)
        if not stop.done():  # the actor has drained, and the run's last event is on its way
            await asyncio.wait((over, stop), timeout=OVER_GRACE_S, return_when=FIRST_COMPLETED)
        return await over if over.done() else None
    finally:
        over.cancel()
        stop.cancel()


async def _supervise(
    config: Config, plan: ActorPlan, over: asyncio.Task[RunEnd], stop: asyncio.Task[Any]
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
            await asyncio.wait((ended,), timeout=OVER_GRACE_S)
            await kill_process(process)
        status = await ended
        if status == 0 or over.done() or stop.done():
            return
        if status > 0 and status != EXIT_GIVEN_UP:
            raise RoleError.quoting(recorded(folder.error(role)) or f"{role}: exit status {status}")
        if asyncio.get_running_loop().time() - started_s > WELL_S:
            backoff_s = FIRST_BACKOFF_S
        await asyncio.wait((over, stop), timeout=backoff_s, return_when=FIRST_COMPLETED)
        if over.done() or stop.done():
            return
        backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
    last_words = recorded(folder.error(role)) or f"read {folder.log(role)}"
    raise RoleError(
        role,
        f"died {max_restarts + 1} times, as often as actors.max_restarts allows "
        f"(last: {_how(status)}): {last_words}",
    )


async def _drain(
    process: asyncio.subprocess.Process,
    ended: asyncio.Task[int],
    over: asyncio.Task[RunEnd],
    plan: ActorPlan,
    timeout_s: float,
) -> None:
    """Have the child drain, for as long as there is a service that it can tell about it."""
    process.send_signal(signal.SIGTERM)
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    while not ended.done() and loop.time() < ends_s:
        if not await listens(plan.host, plan.port, timeout_s=GONE_GRACE_S):
            await asyncio.wait((ended, over), timeout=GONE_GRACE_S, return_when=FIRST_COMPLETED)
            if over.done():
                await asyncio.wait((ended,), timeout=OVER_GRACE_S)
            break
        await asyncio.wait((ended,), timeout=PROBE_INTERVAL_S)
    await kill_process(process)


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
