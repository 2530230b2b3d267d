"""Which GPUs of a node each rank uses, as indices into the visible GPUs. Does not import torch."""

import os
from dataclasses import replace

from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.launcher.rank import Rank


def visible_gpus(num_gpus: int) -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES, or the indices of all GPUs if it is not set."""
    indices = ",".join(map(str, range(num_gpus)))
    return [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", indices).split(",")]


def num_local_learners(config: Config, rank: Rank) -> int:
    """Learner ranks on the node of this rank, which use its first GPUs."""
    others = rank.rank - rank.local_rank
    return min(max(0, config.cluster.learners - others), rank.local_world_size)


def actor_gpus(config: Config, rank: Rank, num_gpus: int) -> tuple[int, ...]:
    """GPUs of this actor rank, one per tensor-parallel rank; empty without GPUs.

    The first GPUs belong to the learners of the node. With one GPU per actor, actors share GPUs
    when there are too few. Raises ConfigError when a tensor-parallel actor does not fit.
    """
    if num_gpus == 0:
        return ()
    each = config.actors.weight_ranks
    num_learners = num_local_learners(config, rank)
    first = num_learners + (rank.local_rank - num_learners) * each
    if each > 1 and first + each > num_gpus:
        raise ConfigError(
            "actors.vllm.tensor_parallel",
            each,
            f"rank {rank.rank} needs GPUs {first} to {first + each - 1} of its node, which has "
            f"{num_gpus}; start fewer processes per node, or use fewer GPUs per actor",
        )
    return tuple((first + offset) % num_gpus for offset in range(each))


def local_actor_gpus(config: Config, rank: Rank, num_gpus: int) -> list[tuple[int, ...]]:
    """`actor_gpus` of every actor rank on the node of this rank."""
    first_rank = rank.rank - rank.local_rank
    ranks = (
        replace(rank, rank=first_rank + local, local_rank=local)
        for local in range(rank.local_world_size)
    )
    return [
        actor_gpus(config, each, num_gpus) for each in ranks if each.rank >= config.cluster.learners
    ]
