"""The registered policy losses of verl on a batch, for make_parity_vectors_verl.py.

Shape legend: S sequences, T tokens (padded to the longest).
"""
# pyright: reportMissingImports=false
# (verl is not a dependency of this project.)

from typing import Any

import torch
from parity_inputs import MAX_TOKENS, Batch, Case, short, without_padding
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

NO_DUAL_CLIP = 1e9
Ours = dict[str, list[Any]]
AGGREGATIONS: dict[str, list[Any]] = {
    "token-mean": ["token_mean", {}],
    "seq-mean-token-mean": ["sequence_mean", {}],
    "seq-mean-token-sum-norm": ["fixed_length", {"max_new_tokens": MAX_TOKENS}],
}


def padded(rows: list[list[float]]) -> Tensor:
    """(S, ragged) -> (S, T) float64, padded with zeros at the end."""
    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(batch: Batch) -> Tensor:
    """(S, T) float64, 1 at tokens."""
    return padded([[1.0] * length for length in batch["lengths"]])


def actor_config(
    aggregation: str, *, dual_clip: float = NO_DUAL_CLIP, **options: Any
) -> ActorConfig:
    scale = {"loss_scale_factor": MAX_TOKENS} if aggregation.endswith("norm") else {}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=aggregation,
        clip_ratio_c=dual_clip,
        global_batch_info=scale,
        **options,
    )


def loss_case(
    batch: Batch,
    *,
    formula: str,
    loss: str,
    config: ActorConfig,
    ours: Ours,
    note: str = "",
    anchor_ST: Tensor | None = None,
    weights_ST: Tensor | None = None,
) -> Case:
    """Value of the registered policy loss `loss` on the batch, and its gradient with respect to
    log pi. The anchor is mu if none is given."""
    mask_ST = mask_of(batch)
    logprobs_ST = padded(batch["logprobs"]).requires_grad_()
    value, _ = core_algos.get_policy_loss_fn(loss)(
        old_log_prob=padded(batch["behaviour_logprobs"]) if anchor_ST is None else anchor_ST,
        log_prob=logprobs_ST,
        advantages=torch.tensor(batch["advantages"], dtype=torch.float64)[:, None] * mask_ST,
        response_mask=mask_ST,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights_ST,
    )
    (gradient_ST,) = torch.autograd.grad(value, logprobs_ST)
    return {
        "formula": formula,
        "call": f"get_policy_loss_fn({loss!r}), loss_agg_mode={config.loss_agg_mode}",
        "note": note,
        "batch": "ragged",
        "ours": {"aggregation": AGGREGATIONS[config.loss_agg_mode], **ours},
        "loss": short(value.item()),
        "gradient": short(without_padding(gradient_ST.tolist(), batch["lengths"])),
    }
