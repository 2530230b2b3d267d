"""Create tests/fakes/parity/verl.json: verl's results for the formulas it shares with this project.

    python scripts/make_parity_vectors_verl.py      in an environment with verl 0.9.1

Every number comes from verl's own functions, in float64: `compute_*_outcome_advantage`, the
registered policy losses, `compute_policy_loss_bypass_mode` for importance weights, `ppo_loss` for
the KL loss and the entropy bonus, and `apply_kl_penalty`. verl's options are set so that the
formula is the same. `note` names options that differ from the defaults.

Shape legend: S sequences, T tokens (padded to the longest).
"""
# pyright: reportMissingImports=false
# (verl is not a dependency of this project.)

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from parity_inputs import (
    CLIP_HIGH,
    CLIP_LOW,
    GRPO_STD_FLOOR,
    Batch,
    Case,
    grouped,
    make_batch,
    on_policy,
    save,
    short,
)
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config.actor import PolicyLossConfig
from verl_losses import (
    AGGREGATIONS,
    NO_DUAL_CLIP,
    actor_config,
    loss_case,
    mask_of,
    padded,
)
from verl_regularization import far_from_reference, regularized_cases

DUAL_CLIP = 1.5
GSPO_CLIP = 0.1
CISPO_HIGH = 0.5
MAX_RATIO = 2.0
GEOMETRIC_BAND = (0.9, 1 / 0.9)  # verl bounds the inverse ratio, so the band is its own inverse
MAX_CHANGE, DPPO_CAP = 0.1, 1.5
PPO_AT_PI: list[Any] = [
    "ppo_clip",
    {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "dual_clip": NO_DUAL_CLIP},
]
PLAIN = ["none", {}]


def advantage_cases(batch: Batch) -> list[Case]:
    sizes = batch["group_sizes"]
    mask_ST = mask_of(batch)
    index = np.repeat(np.arange(len(sizes)), sizes)

    def answer(function: Callable[..., Any], **options: Any) -> list[list[float]]:
        rewards_ST = torch.zeros_like(mask_ST)
        rewards_ST[:, 0] = torch.tensor(batch["rewards"], dtype=torch.float64)
        advantages_ST, _ = function(rewards_ST, mask_ST, index, **options)
        return grouped(short(advantages_ST[:, 0].tolist()), sizes)

    def case(ours: str, theirs: str, note: str = "", **options: Any) -> Case:
        expected = answer(getattr(core_algos, theirs), **options)
        call = f"{theirs}({', '.join(f'{k}={v}' for k, v in options.items())})"
        return {
            "formula": f"advantage {ours} {theirs}",
            "call": call,
            "note": note,
            "batch": "ragged",
            "ours": {"advantage": [ours, {}]},
            "advantages": expected,
        }

    return [
        case("rloo", "compute_rloo_outcome_advantage"),
        case("rloo", "compute_rloo_vectorized_outcome_advantage"),
        case(
            "grpo",
            "compute_grpo_outcome_advantage",
            note="verl's own floor is 1e-6; we follow TRL's 1e-4",
            epsilon=GRPO_STD_FLOOR,
        ),
        case("dr_grpo", "compute_grpo_outcome_advantage", norm_adv_by_std_in_grpo=False),
    ]


def clipped_cases(batch: Batch) -> list[Case]:
    clips = {"clip_ratio_low": CLIP_LOW, "clip_ratio_high": CLIP_HIGH}
    ppo = ["ppo_clip", {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "dual_clip": DUAL_CLIP}]
    no_dual_clip = {"dual_clip": NO_DUAL_CLIP}
    gspo = ["gspo", {"clip_low": GSPO_CLIP, "clip_high": GSPO_CLIP, **no_dual_clip}]
    cases = [
        loss_case(
            batch,
            formula=f"ppo_clip {mode}",
            loss="vanilla",
            config=actor_config(mode, dual_clip=DUAL_CLIP, **clips),
            ours={"correction": PLAIN, "policy_loss": ppo},
            note="clip_ratio_c is 1.5, so that the dual clip acts on some tokens (verl: 3)",
        )
        for mode in AGGREGATIONS
    ]
    cases.append(
        loss_case(
            batch,
            formula="gspo",
            loss="gspo",
            config=actor_config(
                "seq-mean-token-mean", clip_ratio_low=GSPO_CLIP, clip_ratio_high=GSPO_CLIP
            ),
            ours={"correction": PLAIN, "policy_loss": gspo},
        )
    )
    cases.append(
        loss_case(
            batch,
            formula="cispo",
            loss="cispo",
            config=actor_config("token-mean", clip_ratio_low=1.0, clip_ratio_high=CISPO_HIGH),
            ours={"correction": PLAIN, "policy_loss": ["cispo", {"clip_high": CISPO_HIGH}]},
            note="verl also cuts at 1 - clip_ratio_low; ours has no lower cut, so that is 0 here",
        )
    )
    return cases


def importance_cases(batch: Batch) -> list[Case]:
    """REINFORCE with weights on pi / mu, through verl's bypass mode."""
    low = {"min_ratio": 0.5}
    kinds = {
        "token_tis": ("token", MAX_RATIO, {}),
        "sequence_tis": ("sequence", MAX_RATIO, {}),
        "token_mask": ("token", f"0.5_{MAX_RATIO}", low),
        "sequence_mask": ("sequence", f"0.5_{MAX_RATIO}", low),
        "sequence_snis": ("sequence", MAX_RATIO, {}),
        "none": (None, None, None),
    }
    cases = []
    for name, (level, threshold, more) in kinds.items():
        rollout = RolloutCorrectionConfig(
            loss_type="reinforce",
            rollout_is=level,
            rollout_is_threshold=threshold,
            rollout_is_batch_normalize=name == "sequence_snis",
            bypass_mode=True,
        )
        correction = [name, {} if more is None else {"max_ratio": MAX_RATIO, **more}]
        cases.append(
            loss_case(
                batch,
                formula=f"policy_gradient {name}",
                loss="bypass_mode",
                config=actor_config(
                    "token-mean", policy_loss=PolicyLossConfig(rollout_correction=rollout)
                ),
                ours={"correction": correction, "policy_loss": ["policy_gradient", {}]},
                note=f"loss_type=reinforce, rollout_is={level}, threshold={threshold}",
            )
        )
    return cases


def decoupled_case(batch: Batch) -> Case:
    """The clipped loss with anchor pi_theta, and verl's weights on pi_theta / mu."""
    log_mu_ST, log_pi_ST = padded(batch["behaviour_logprobs"]), padded(batch["logprobs"])
    clips = {"clip_ratio_low": CLIP_LOW, "clip_ratio_high": CLIP_HIGH}
    weights_ST, _ = rollout_corr_helper.compute_rollout_correction_weights(
        log_pi_ST - log_mu_ST, mask_of(batch), "token", MAX_RATIO
    )
    return loss_case(
        batch,
        formula="ppo_clip token_tis",
        loss="vanilla",
        config=actor_config("token-mean", **clips),
        ours={"correction": ["token_tis", {"max_ratio": MAX_RATIO}], "policy_loss": PPO_AT_PI},
        anchor_ST=log_pi_ST,
        weights_ST=weights_ST,
        note="the anchor is an input; weights by compute_rollout_correction_weights",
    )


def geometric_mask_case(batch: Batch) -> Case:
    """The GSPO loss without a clip on the completions that verl's rejection by the geometric mean
    keeps. Its value is -s A at our ratio of 1, and s is our weight."""
    log_ratios_ST = padded(batch["logprobs"]) - padded(batch["behaviour_logprobs"])
    low, high = GEOMETRIC_BAND
    kept_ST, _ = rollout_corr_helper.compute_rollout_rejection_mask(
        log_ratios_ST, mask_of(batch), "seq_mean_k1", f"{low}_{high}"
    )
    return loss_case(
        batch,
        formula="geometric_mask",
        loss="gspo",
        config=actor_config(
            "seq-mean-token-mean", clip_ratio_low=NO_DUAL_CLIP, clip_ratio_high=NO_DUAL_CLIP
        ),
        ours={
            "correction": ["geometric_mask", {"min_ratio": low, "max_ratio": high}],
            "policy_loss": PPO_AT_PI,
        },
        weights_ST=kept_ST,
        note=f"rollout_rs=seq_mean_k1 at {low}_{high}, as weights of 0 and 1",
    )


def probability_mask_case(batch: Batch) -> Case:
    """DPPO with the mask by total variation. Its loss is a weighted log-probability."""
    return loss_case(
        batch,
        formula="probability_mask",
        loss="dppo_tv",
        config=actor_config(
            "token-mean",
            dual_clip=DPPO_CAP,
            clip_ratio_low=MAX_CHANGE,
            clip_ratio_high=MAX_CHANGE,
        ),
        ours={
            "correction": [
                "probability_mask",
                {"max_ratio": DPPO_CAP, "max_probability_change": MAX_CHANGE},
            ],
            "policy_loss": ["policy_gradient", {}],
        },
        note="clip_ratio_c, the cap of the ratio, is 1.5, so that it acts (verl: 20)",
    )


def main() -> None:
    torch.set_num_threads(1)
    batch = make_batch(20, group_sizes=[5, 3, 4])
    cases = [
        *advantage_cases(batch),
        *clipped_cases(batch),
        *importance_cases(batch),
        decoupled_case(batch),
        geometric_mask_case(batch),
        probability_mask_case(batch),
        *regularized_cases(batch),
    ]
    batches = {
        "ragged": batch,
        "on_policy": on_policy(batch),
        "far_from_reference": far_from_reference(batch),
    }
    save("verl", batches=batches, cases=cases)


if __name__ == "__main__":
    main()
