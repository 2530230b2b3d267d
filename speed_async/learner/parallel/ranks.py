"""The learner ranks of a run: their process group, device mesh and small collective operations.

One rank needs neither group nor mesh (`ONE_RANK`). With several ranks, every rank must call the
same operations in the same order.

Shape legend: R ranks.
"""

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from speed_async.learner.limits import num_shards

POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    rank: int
    size: int
    device: torch.device | None = None
    """On which this rank computes; None: where its model is."""
    mesh: DeviceMesh | None = None
    """Mesh of the sharded parameters; None for one rank."""
    store: Store | None = None
    """In the process of rank 0; None for one rank."""

    def await_first(self, what: str) -> None:
        """Blocks the other ranks until rank 0 has called this: for steps of rank 0 that may take
        longer than a collective operation may wait. Raises RuntimeError when rank 0 has ended."""
        if self.store is None:
            return
        if self.rank == 0:
            self.store.set(what, "done")
            return
        while not self.store.check([what]):
            time.sleep(POLL_S)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all ranks, (R, ...), on the CPU. They have the same shape on each rank."""
        values = values.detach().cpu()
        if self.size == 1:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def merge(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the CPU. It is exact where all ranks but one have zeros."""
        values = values.detach().cpu()
        if self.size > 1:
            dist.all_reduce(values)
        return values


ONE_RANK = Ranks(rank=0, size=1)


def join_ranks(
    store: Store,
    *,
    rank: int,
    size: int,
    device: torch.device,
    ranks_per_node: int,
    timeout_s: float,
) -> Ranks:
    """Makes the default process group of this process; blocks until all ranks have joined.

    Parameters are sharded over the ranks of a node and replicated across nodes (HSDP). If the
    learner ranks do not fill their nodes evenly, parameters are sharded over all ranks. `timeout_s`
    is the longest wait in one collective operation. Raises RuntimeError, as torch.distributed does.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
    )
    shape, names = (size,), ("shard",)
    shards = num_shards(size, ranks_per_node=ranks_per_node)
    if shards < size:
        shape, names = (size // shards, shards), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Ranks(rank=rank, size=size, device=device, mesh=mesh, store=store)


def leave_ranks() -> None:
    """Frees the process group. Does not wait for other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
