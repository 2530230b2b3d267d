"""The parallelism interface: the operations that differ between one learner rank and an FSDP group.

The trainer is independent of how parameters are sharded. An FSDP implementation shards the policy
in place in `wrap`, gathers one tensor at a time in `full_tensors`, and reduces over ranks in
`clip_grad_norm`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speed_async.learner.optimizer import named_state

PolicyModule = TypeVar("PolicyModule", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class FullState:
    """Unsharded tensors on this rank, as stored in a checkpoint."""

    model: dict[str, Tensor]  # every name, including tied parameters
    optimizer: dict[str, Tensor]  # "<parameter name>.<slot>"


class Parallel(Protocol):
    def wrap(self, policy: PolicyModule) -> PolicyModule:
        """Called once, before the optimiser is created from the parameters."""
        ...

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float:
        """Clips gradients to a global 2-norm of `max_norm`; returns the norm before clipping."""
        ...

    def full_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Each distinct parameter once, in layer order. A tied parameter has its first name.
        Tensors are detached views, valid until the next update."""
        ...

    def full_state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> FullState: ...


class SingleRank:
    """One process with unsharded parameters."""

    def wrap(self, policy: PolicyModule) -> PolicyModule:
        return policy

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True))

    def full_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()

    def full_state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> FullState:
        return FullState(model=model.state_dict(), optimizer=named_state(optimizer, model))
