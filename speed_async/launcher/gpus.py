"""Which GPUs of a node each rank uses, as indices into the visible GPUs. Does not import torch."""

import os

from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.launcher.rank import Rank


def visible_gpus(num_gpus: int) -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES, or the indices of all GPUs if it is not set."""
    indices = ",".join(map(str, range(num_gpus)))
    return [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", indices).split(",")]


def actor_gpus(config: Config, rank: Rank, num_gpus: int) -> tuple[int, ...]:
    """GPUs of this actor rank, one per tensor-parallel rank; empty without GPUs.

    The first GPUs belong to the learners of the node. With one GPU per actor, actors share GPUs
    when there are too few. Raises ConfigError when a tensor-parallel actor does not fit.
    """
    if num_gpus == 0:
        return ()
    each = config.actors.weight_ranks
    num_learners = max(0, config.cluster.learners - (rank.rank - rank.local_rank))
    first = num_learners + (rank.local_rank - num_learners) * each
    if each > 1 and first + each > num_gpus:
        raise ConfigError(
            "actors.vllm.tensor_parallel",
            each,
            f"rank {rank.rank} needs GPUs {first} to {first + each - 1} of its node, which has "
            f"{num_gpus}; start fewer processes per node, or use fewer GPUs per actor",
        )
    return tuple((first + offset) % num_gpus for offset in range(each))


def local_actor_gpus(config: Config, learner: Rank, num_gpus: int) -> list[tuple[int, ...]]:
    """`actor_gpus` of every actor rank on the learner's node."""
    first_rank = learner.rank - learner.local_rank
    ranks = (
        Rank(
            rank=first_rank + local,
            world_size=learner.world_size,
            local_rank=local,
            local_world_size=learner.local_world_size,
        )
        for local in range(learner.local_world_size)
    )
    return [
        actor_gpus(config, rank, num_gpus) for rank in ranks if rank.rank >= config.cluster.learners
    ]
