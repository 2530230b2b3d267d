"""The parallelism seam: all that changes between one learner rank and an FSDP group.

The trainer never asks how parameters are laid out; whoever implements this does. With FSDP,
`wrap` shards the policy in place, `full_tensors` gathers one tensor at a time, and `clip_grad_norm`
reduces over ranks.
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
    """Whole tensors on this rank: what a checkpoint stores."""

    model: dict[str, Tensor]  # every name, tied ones too
    optimizer: dict[str, Tensor]  # "<parameter name>.<slot>"


class Parallel(Protocol):
    def wrap(self, policy: PolicyModule) -> PolicyModule:
        """Called once, before the optimiser is made from the parameters."""
        ...

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients to a global 2-norm of at most `max_norm`; returns the norm before."""
        ...

    def full_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Each distinct parameter once (a tied one under its first name), in layer order.
        Tensors are detached views, valid until the next update."""
        ...

    def full_state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> FullState: ...


class SingleRank:
    """One process, whole parameters."""

    def wrap(self, policy: PolicyModule) -> PolicyModule:
        return policy

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True))

    def full_tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()

    def full_state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> FullState:
        return FullState(model=model.state_dict(), optimizer=named_state(optimizer, model))
