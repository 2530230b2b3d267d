"""Parameters sharded over the learner ranks by FSDP2 (`fully_shard`).

Every rank has a part of each parameter, of its gradient and of the optimiser's moments, all in
float32 (frozen parameters may have another dtype). A layer is gathered for its forward and backward
pass only. Gradients are summed over the ranks, not averaged: the weights of the loss are those of
the whole batch.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from speed_async.config.sections.learner import ActivationCheckpointing
from speed_async.errors import ModelError
from speed_async.learner.model import decoder_layers, empty_model, load_model
from speed_async.learner.parallel.ranks import Ranks
from speed_async.learner.policy import Policy
from speed_async.weight_sync.device import DeviceChoice


def load_for_rank(
    folder: Path,
    ranks: Ranks,
    *,
    device: DeviceChoice,
    activation_checkpointing: ActivationCheckpointing,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """The model of one rank. With several, rank 0 has the values, in host memory, and the others
    have none. `on_cpu` leaves it in host memory, also with one rank. Raises ModelError as
    `load_model`."""
    if ranks.rank > 0:
        return empty_model(folder, device=device, activation_checkpointing=activation_checkpointing)
    return load_model(
        folder,
        device=device,
        activation_checkpointing=activation_checkpointing,
        on_cpu=on_cpu or ranks.size > 1,
    )


def shard(
    policy: Policy, ranks: Ranks, *, half_precision: bool = False, cpu_offload: bool = False
) -> None:
    """Replaces the parameters by DTensors of `ranks.mesh`: each decoder layer is one unit, and the
    rest, embeddings and head, another. Does nothing for one rank.

    Rank 0 has the values, and every rank gets its part of them: the parameters of other ranks need
    none (`empty_model`). Make optimisers afterwards, and use only the forward of the policy, which
    gathers the embeddings and the head. On GPUs, `half_precision` gathers and
    computes in bfloat16, and takes the place of autocast. `cpu_offload` keeps parameters, gradients
    and optimiser on the CPU between uses.
    """
    if ranks.mesh is None:
        return
    # The outputs of the policy are views, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    half_precision = half_precision and ranks.mesh.device_type == "cuda"
    policy.autocasts = not half_precision
    _check_modules(policy.causal_lm)
    values = [tensor.detach() for tensor in _tensors(policy)]
    _check_equal_on_all_ranks(values, ranks)
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
    compute_device = torch.device(ranks.mesh.device_type)
    if any(tensor.is_meta for tensor in values):
        policy.to_empty(device="cpu" if cpu_offload else compute_device)
        for module in policy.modules():  # buffers are not offloaded
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(compute_device)
    for tensor, value in zip(_tensors(policy), values, strict=True):
        _distribute(value, tensor, compute_device)


def _check_modules(model: PreTrainedModel) -> None:
    """Raises ModelError for a model that would be gathered whole, or that could wait for good."""
    remedy = "set cluster.learners to 1"
    if not decoder_layers(model):
        raise ModelError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules), so its "
            f"parameters cannot be sharded layer by layer: {remedy}"
        )
    has_own_experts = any(
        name.rpartition(".")[2] == "experts" and isinstance(module, nn.ModuleList)
        for name, module in model.named_modules()
    )
    if has_own_experts and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ModelError(
            f"the experts of {type(model).__name__} are modules of their own, of which some ranks "
            f"may use none: several learners need torch 2.13 for that; install it, or {remedy}"
        )


def _tensors(policy: Policy) -> list[Tensor]:
    """All parameters and buffers, tied ones once, in the same order on every rank."""
    return [*policy.parameters(), *policy.buffers()]


def _check_equal_on_all_ranks(values: Sequence[Tensor], ranks: Ranks) -> None:
    """Raises ModelError, on all ranks, if the followers' empty model has other tensors than the
    loaded one."""
    shapes = repr([(tuple(value.shape), value.dtype) for value in values])
    digest = int.from_bytes(hashlib.sha256(shapes.encode()).digest()[:7], "big")
    if len(ranks.gather(torch.tensor(digest)).unique()) > 1:
        raise ModelError(
            "the weights in model.path do not fit its config.json, for example a head of its own "
            "where tie_word_embeddings is true: several learners load a model by config.json; "
            "correct it, or set cluster.learners to 1"
        )


@torch.no_grad()
def _distribute(value: Tensor, target: Tensor, device: torch.device) -> None:
    """Sets `target` to the `value` of rank 0. One whole tensor at a time is in memory."""
    value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        part = distribute_tensor(value, mesh, placements, src_data_rank=0)
        target.to_local().copy_(part.to_local())
    else:
        value = value.contiguous()
        dist.broadcast(value, src=0)
        target.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks, which must all call this; itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
