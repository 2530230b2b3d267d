"""An actor rank of torchrun: finds the service, then supervises the actor, its child."""

import asyncio
import os
import signal
from pathlib import Path

import torch

from speed_async.config.schema import Config
from speed_async.runtime.processes import log_to
from speed_async.runtime.rendezvous import Rank, Rendezvous
from speed_async.runtime.run_folder import RunFolder
from speed_async.runtime.supervisor import ActorPlan, supervise


async def supervise_rank(config: Config, rank: Rank) -> None:
    """Run this rank's actor to its end. Raises RoleError with the actor's own words."""
    stopping = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stopping.set)
    rendezvous = Rendezvous(rank, config.cluster.connect_timeout_s)
    address = await rendezvous.find(stopping)
    if address is None:
        return
    plan = ActorPlan(
        index=rank.rank,
        host=address.host,
        port=address.port,
        folder=Path(address.run_folder),
        environment=_own_gpu(rank),
    )
    log_to(RunFolder(path=plan.folder).log(f"{plan.role}-supervisor"))
    await supervise(config, plan, stopping=stopping, run_over=rendezvous.until_ended())


def _own_gpu(rank: Rank) -> dict[str, str]:
    """Let the actor see one GPU, its local rank's; nothing changes where there is none."""
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[rank.local_rank % len(visible)]}
