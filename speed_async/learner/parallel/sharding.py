"""Parameters sharded over the learner ranks by FSDP2 (`fully_shard`).

Every rank has a part of each parameter, of its gradient and of the optimiser's moments, all in
float32. A layer is gathered for its forward and backward pass only. Gradients are summed over the
ranks, not averaged: the weights of the loss are those of the whole batch.
"""

import warnings

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from speed_async.learner.model import decoder_layers
from speed_async.learner.parallel.ranks import Ranks
from speed_async.learner.policy import Policy


def shard(
    policy: Policy, ranks: Ranks, *, half_precision: bool = False, cpu_offload: bool = False
) -> None:
    """Replaces the parameters by DTensors of `ranks.mesh`: each decoder layer is one unit, and the
    rest, embeddings and head, another. Does nothing for one rank.

    Every rank has the same values before. Make optimisers afterwards, and use only the forward of
    the policy, which gathers the embeddings and the head. On GPUs, `half_precision` gathers and
    computes in bfloat16, and takes the place of autocast. `cpu_offload` keeps parameters, gradients
    and optimiser on the CPU between uses.
    """
    if ranks.mesh is None:
        return
    # The outputs of the policy are views, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    half_precision = half_precision and ranks.mesh.device_type == "cuda"
    policy.autocasts = not half_precision
    for module in (*decoder_layers(policy.causal_lm), policy):
        sharded: FSDPModule = fully_shard(
            module,
            mesh=ranks.mesh,
            # Also the root: its gathered parameters would otherwise outlive an optimiser step.
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half_precision else None, reduce_dtype=torch.float32
            ),
            offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # torch 2.13
            # Experts that are modules of their own may get no token on some ranks.
            sharded.set_reduce_scatter_unused_params(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks, which must all call this; itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
