"""An actor rank of torchrun: finds the service, then supervises the actor, its child."""

import asyncio
import os
import signal
from pathlib import Path

import torch

from speed_async.actors.engine_choice import engine_environment
from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.runtime.logs import log_to
from speed_async.runtime.rendezvous import Rank, Rendezvous
from speed_async.runtime.run_folder import RunFolder
from speed_async.runtime.supervisor import ActorPlan, supervise


async def supervise_rank(config: Config, rank: Rank) -> None:
    """Run this rank's actor to its end. Raises RoleError with the actor's own words."""
    stopping = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stopping.set)
    rendezvous = Rendezvous(config.cluster.connect_timeout_s)
    environment = _own_gpus(config, rank) | engine_environment(config)
    # Once, but for ranks of several nodes, whose agents start them again at different times: a
    # learner of another life than was found at first may come.
    while (address := await rendezvous.find(stopping)) is not None:
        plan = ActorPlan(
            index=rank.rank,
            host=address.host,
            port=address.port,
            folder=Path(address.run_folder),
            life=address.life,
            environment=environment,
        )
        log_to(RunFolder(path=plan.folder).log(f"{plan.role}-supervisor"))
        run_over = rendezvous.until_over(address.life)
        await supervise(config, plan, stopping=stopping, run_over=run_over)
        if stopping.is_set() or not rendezvous.is_replaced(address.life):
            return


def _own_gpus(config: Config, rank: Rank) -> dict[str, str]:
    """Let the actor see the GPUs that its model is split over; nothing changes where there is no
    GPU. Learners on this node have the first ones, and with one GPU an actor they may be shared.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    each = config.actors.weight_ranks
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
