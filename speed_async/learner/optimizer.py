"""AdamW with linear warm-up, and its state keyed by parameter name."""

import torch
from torch import Tensor, nn

from speed_async.config.schema import LearnerConfig


def make_optimizer(model: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    """Applies weight decay to matrices and embeddings (parameters with two or more dimensions).

    Fused: one kernel for all parameters, on CPU and CUDA.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        fused=True,
    )


def warmed_up_lr(config: LearnerConfig, num_updates: int) -> float:
    """Learning rate of the update after `num_updates`: linear up to `lr`, then constant.

    With 10 warm-up updates, the first uses lr / 10 and the tenth lr. With 0, all use lr.
    """
    return config.lr * min(1.0, (num_updates + 1) / max(config.warmup_updates, 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimiser tensors keyed by "<parameter name>.<slot>"; empty before the first step."""
    return {
        f"{name}.{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]
) -> None:
    """Inverse of `named_state`. Raises KeyError for an unknown parameter name."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in state.items():
        name, _, slot = key.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value.to(parameter.device).clone()
