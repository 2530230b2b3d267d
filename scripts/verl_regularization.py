"""The KL divergence and the entropy bonus of verl on a batch, for make_parity_vectors_verl.py.

Shape legend: S sequences, T tokens (padded to the longest).
"""
# pyright: reportMissingImports=false
# (verl is not a dependency of this project.)

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from parity_inputs import (
    CLIP_HIGH,
    CLIP_LOW,
    Batch,
    Case,
    grouped,
    on_policy,
    short,
    without_padding,
)
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl_losses import AGGREGATIONS, NO_DUAL_CLIP, actor_config, mask_of, padded

NO_CLIP = NO_DUAL_CLIP
UNCLIPPED: list[Any] = [
    "ppo_clip",
    {"clip_low": NO_CLIP, "clip_high": NO_CLIP, "dual_clip": NO_CLIP},
]
PPO: list[Any] = [
    "ppo_clip",
    {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "dual_clip": NO_CLIP},
]
PLAIN = ["none", {}]
KL_COEFFICIENT, ENTROPY_COEFFICIENT = 0.1, 0.05


def far_from_reference(batch: Batch) -> Batch:
    """On-policy, with pi so far below the reference that k3 exceeds its bound for some tokens and
    not for others."""
    return on_policy(batch, shift=2.0)


def regularized_cases(batch: Batch) -> list[Case]:
    """The KL loss, on-policy because ours weights it by pi / mu; the entropy bonus; the KL in the
    reward."""
    clips = {"clip_ratio_low": NO_DUAL_CLIP, "clip_ratio_high": NO_DUAL_CLIP}
    cases = [
        _case(
            one,
            name=name,
            formula=f"ppo_clip kl {kind}",
            config=actor_config(
                "token-mean",
                use_kl_loss=True,
                kl_loss_coef=KL_COEFFICIENT,
                kl_loss_type=kind,
                **clips,
            ),
            ours={
                "correction": PLAIN,
                "policy_loss": UNCLIPPED,
                "regularization": {"kl": kind, "kl_coefficient": KL_COEFFICIENT},
            },
            note=f"kl_loss_type={kind}",
        )
        for kind in ("k2", "k3")
        for name, one in (
            ("on_policy", on_policy(batch)),
            ("far_from_reference", far_from_reference(batch)),
        )
    ]
    clips = {"clip_ratio_low": CLIP_LOW, "clip_ratio_high": CLIP_HIGH}
    entropy = _case(
        batch,
        name="ragged",
        formula="ppo_clip entropy",
        config=actor_config("seq-mean-token-mean", entropy_coeff=ENTROPY_COEFFICIENT, **clips),
        ours={
            "correction": PLAIN,
            "policy_loss": PPO,
            "regularization": {"entropy_coefficient": ENTROPY_COEFFICIENT},
        },
    )
    return [*cases, entropy, _kl_in_reward(batch)]


def _kl_in_reward(batch: Batch) -> Case:
    """Advantages of rewards from which k1 of all tokens of the completion is subtracted."""
    index = np.repeat(np.arange(len(batch["group_sizes"])), batch["group_sizes"])
    advantages_ST, _ = core_algos.compute_rloo_outcome_advantage(
        _rewards_with_kl(batch, KL_COEFFICIENT), mask_of(batch), index
    )
    return {
        "formula": "advantage rloo kl k1",
        "call": "apply_kl_penalty, kl_penalty=k1; compute_rloo_outcome_advantage",
        "note": "",
        "batch": "ragged",
        "ours": {
            "advantage": ["rloo", {}],
            "regularization": {"kl": "k1", "kl_coefficient": KL_COEFFICIENT},
        },
        "advantages": grouped(short(advantages_ST[:, 0].tolist()), batch["group_sizes"]),
    }


def _case(
    batch: Batch,
    *,
    name: str,
    formula: str,
    config: ActorConfig,
    ours: dict[str, Any],
    note: str = "",
) -> Case:
    """Value of verl's whole loss, `ppo_loss`, on the batch of this name, and its gradients with
    respect to log pi and, with an entropy bonus, to the entropies."""
    wanted = {"gradient": padded(batch["logprobs"]).requires_grad_()}
    outputs = {"log_probs": _of_whole_sequences(wanted["gradient"], batch)}
    if config.entropy_coeff:
        wanted["entropy_gradient"] = padded(batch["entropies"]).requires_grad_()
        outputs["entropy"] = _of_whole_sequences(wanted["entropy_gradient"], batch)
    mask_ST = mask_of(batch)
    prompts_S1 = torch.ones(len(mask_ST), 1, dtype=torch.long)
    data = TensorDict(
        {
            "prompts": prompts_S1,
            "responses": torch.ones_like(mask_ST, dtype=torch.long),
            "attention_mask": torch.cat([prompts_S1, mask_ST.long()], dim=1),
            "response_mask": mask_ST,
            "old_log_probs": padded(batch["behaviour_logprobs"]),
            "ref_log_prob": padded(batch["reference_logprobs"]),
            "advantages": torch.tensor(batch["advantages"], dtype=torch.float64)[:, None] * mask_ST,
        },
        batch_size=[len(mask_ST)],
    )
    tensordict_utils.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=None, global_batch_size=None
    )
    value, _ = ppo_loss(config, outputs, data)
    gradients = torch.autograd.grad(value, [*wanted.values()])
    return {
        "formula": formula,
        "call": f"ppo_loss, loss_agg_mode={config.loss_agg_mode}",
        "note": note,
        "batch": name,
        "ours": {"aggregation": AGGREGATIONS[config.loss_agg_mode], **ours},
        "loss": short(value.item()),
    } | {
        field: short(without_padding(each_ST.tolist(), batch["lengths"]))
        for field, each_ST in zip(wanted, gradients, strict=True)
    }


def _rewards_with_kl(batch: Batch, coefficient: float) -> Tensor:
    """Rewards of tokens (S, T) after verl's KL penalty, with pi as the old policy."""
    mask_ST = mask_of(batch)
    scores_ST = torch.zeros_like(mask_ST)
    scores_ST[:, 0] = torch.tensor(batch["rewards"], dtype=torch.float64)
    tensors = {
        "response_mask": mask_ST,
        "token_level_scores": scores_ST,
        "old_log_probs": padded(batch["logprobs"]),
        "ref_log_prob": padded(batch["reference_logprobs"]),
    }
    data = SimpleNamespace(batch=TensorDict(tensors, batch_size=[len(mask_ST)]))
    controller = core_algos.FixedKLController(kl_coef=coefficient)
    data, _ = apply_kl_penalty(data, controller, kl_penalty="k1")
    return data.batch["token_level_rewards"]


def _of_whole_sequences(values_ST: Tensor, batch: Batch) -> Tensor:
    """The values of all sequences, one after another, as a model returns them: each at the position
    before its token, after a prompt of one token, and one more at the end."""
    rows = [
        torch.cat([values_T[:n], values_T.new_zeros(1)])
        for values_T, n in zip(values_ST, batch["lengths"], strict=True)
    ]
    return torch.cat(rows)
