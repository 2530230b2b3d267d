"""AdamW, its learning rate, and its state keyed by parameter name."""

import math

import torch
from torch import Tensor, nn

from speed_async.config.sections.learner import LearnerConfig


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
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(config: LearnerConfig, num_updates: int, *, total_updates: int) -> float:
    """Learning rate of the update after `num_updates`, in updates (batches): linear up to `lr`,
    then `learner.lr_schedule`.

    With 10 warm-up updates, the first uses lr / 10 and the tenth lr. With 0, all use lr. A schedule
    decreases over the updates after the warm-up and would reach `min_lr_share` x lr at the update
    after the last one. Source of `cosine`: Loshchilov and Hutter 2017, "SGDR" (arXiv 1608.03983),
    equation 5, without restarts.
    """
    num_warmup = config.warmup_updates
    if num_updates < num_warmup:
        return config.lr * min(1.0, (num_updates + 1) / num_warmup)
    progress = min(1.0, (num_updates - num_warmup) / max(total_updates - num_warmup, 1))
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }[config.lr_schedule]
    return config.lr * (config.min_lr_share + (1.0 - config.min_lr_share) * remaining)


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
