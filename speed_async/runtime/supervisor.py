"""An actor rank: a thin supervisor whose child is the actor.

consumes   the child's exit, signals
waits for  the service's address, then the child
restarts   a child that was killed by a signal or given up as lost, with back-off; an actor that
           failed with an error of its own ends the run instead, because it would fail again
"""

import asyncio
import os
import signal
from pathlib import Path

import torch

from speed_async.actors.engine_choice import engine_environment
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, RoleError
from speed_async.runtime.failure import EXIT_GIVEN_UP, recorded
from speed_async.runtime.processes import end_process, log_to, start_role
from speed_async.runtime.rendezvous import Rank, Rendezvous
from speed_async.runtime.run_folder import RunFolder

FIRST_BACKOFF_S = 0.5


async def supervise_actor(config: Config, rank: Rank) -> None:
    """Run one actor to its end. Raises RoleError with the actor's own words."""
    stopping = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stopping.set)
    rendezvous = Rendezvous(rank, config.cluster.connect_timeout_s)
    address = await rendezvous.find(stopping)
    if address is None:
        return
    folder = RunFolder(path=Path(address.run_folder))
    role = f"actor-{rank.rank}"
    log_to(folder.log(f"{role}-supervisor"))
    arguments = ["--config", str(folder.config), "--run-folder", str(folder.path)]
    arguments += ["--host", address.host, "--port", str(address.port)]
    arguments += ["--index", str(rank.rank)]
    status = 0
    for incarnation in range(config.actors.max_restarts + 1):
        folder.error(role).unlink(missing_ok=True)
        process = await start_role(
            "actor",
            [*arguments, "--incarnation", str(incarnation)],
            log=folder.log(role),
            stdout=asyncio.subprocess.DEVNULL,
            environment=_own_gpus(config, rank) | engine_environment(config),
        )
        status = await _wait_or_stop(process, stopping, config.cluster.drain_timeout_s)
        if status == 0 or stopping.is_set() or rendezvous.ended():
            return
        if status > 0 and status != EXIT_GIVEN_UP:
            text = recorded(folder.error(role)) or f"{role}: exit status {status}"
            raise RoleError.quoting(text)
        await _stop_or_sleep(stopping, FIRST_BACKOFF_S * 2**incarnation)
        if stopping.is_set() or rendezvous.ended():
            return
    last_words = recorded(folder.error(role)) or f"read {folder.log(role)}"
    raise RoleError(
        role,
        f"died {config.actors.max_restarts + 1} times, as often as actors.max_restarts allows "
        f"(last: {_how(status)}): {last_words}",
    )


async def _wait_or_stop(
    process: asyncio.subprocess.Process, stopping: asyncio.Event, grace_s: float
) -> int:
    """Exit status of the child. On a stop signal the child is asked to drain, then made to."""
    ended = asyncio.create_task(process.wait(), name="child")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    await asyncio.wait((ended, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not ended.done():
        process.send_signal(signal.SIGTERM)
        await end_process(process, grace_s)
    return await ended


async def _stop_or_sleep(stopping: asyncio.Event, delay_s: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), delay_s)
    except TimeoutError:
        return


def _own_gpus(config: Config, rank: Rank) -> dict[str, str]:
    """Let the actor see the GPUs that its model is split over; nothing changes where there is no
    GPU. Learners on this node have the first ones, and with one GPU an actor they may be shared.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    each = config.actors.vllm.tensor_parallel if config.actors.engine == "vllm" else 1
    num_learners = max(0, config.cluster.learners - (rank.rank - rank.local_rank))
    first = num_learners + (rank.local_rank - num_learners) * each
    if each > 1 and first + each > count:
        raise ConfigError(
            "actors.vllm.tensor_parallel",
            each,
            f"rank {rank.rank} would need GPUs {first} to {first + each - 1} of its node, which "
            f"has {count}; start fewer processes a node, or split over fewer GPUs",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    chosen = [visible[(first + i) % len(visible)] for i in range(each)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
