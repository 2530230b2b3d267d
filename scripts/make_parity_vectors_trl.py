# pyright: reportMissingImports=false
"""Create tests/fakes/parity/trl.json: TRL's results for the formulas it shares with this project.

    python scripts/make_parity_vectors_trl.py      in an environment with trl 1.16.0

The numbers come from GRPOTrainer's own `_generate_and_score_completions` (advantages, importance
ratios, masks) and `_compute_loss`, and from `get_soft_overlong_punishment`, in float64. Only the
inputs that need a model are given: completions, their log-probabilities, entropies and rewards.

Shape legend: B sequences, C completion tokens (padded to the longest).
"""

import tempfile
from typing import Any

import torch
from parity_inputs import (
    CLIP_HIGH,
    CLIP_LOW,
    MAX_TOKENS,
    Batch,
    Case,
    grouped,
    make_batch,
    on_policy,
    save,
    short,
    truncated,
)
from torch import Tensor
from trl.rewards.other_rewards import get_soft_overlong_punishment
from trl.trainer.grpo_config import GRPOConfig
from trl_given_rollouts import TOKEN, GivenRollouts, padded

GSPO_CLIP = 0.1
CISPO_HIGH = 0.5
MIN_RATIO, MAX_RATIO = 0.5, 2.0
MAX_NEGATIVE_KL = 0.05
DUAL_CLIP = 1.5
KL_COEFFICIENT, ENTROPY_COEFFICIENT = 0.1, 0.05
NO_DUAL_CLIP = {"dual_clip": 1e9}
PPO = ["ppo_clip", {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, **NO_DUAL_CLIP}]
GSPO = ["gspo", {"clip_low": GSPO_CLIP, "clip_high": GSPO_CLIP, **NO_DUAL_CLIP}]
CISPO = ["cispo", {"clip_high": CISPO_HIGH}]
UNCLIPPED = ["ppo_clip", {"clip_low": 1e9, "clip_high": 1e9, **NO_DUAL_CLIP}]
PLAIN = ["none", {}]
CLIPS = {"epsilon": CLIP_LOW, "epsilon_high": CLIP_HIGH}
AGGREGATIONS = {
    "dapo": ["token_mean", {}],
    "bnpo": ["token_mean", {}],
    "grpo": ["sequence_mean", {}],
    "dr_grpo": ["fixed_length", {"max_new_tokens": MAX_TOKENS}],
}


def trainer(batch: Batch, *, num_generations: int | None = None, **options: Any) -> GivenRollouts:
    num_sequences = len(batch["lengths"])
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=num_sequences,
            num_generations=num_generations or batch["group_sizes"][0],
            max_completion_length=MAX_TOKENS,
            **{"beta": 0.0, **options},
        )
    return GivenRollouts(batch, args)


def loss_inputs(batch: Batch) -> dict[str, Tensor]:
    """Inputs of `_compute_loss`, with log mu as the old log-probabilities."""
    mask_BC = padded([[1] * n for n in batch["lengths"]]).long()
    return {
        "prompt_ids": torch.full((len(mask_BC), 1), TOKEN),
        "prompt_mask": torch.ones(len(mask_BC), 1, dtype=torch.long),
        "completion_ids": mask_BC * TOKEN,
        "completion_mask": mask_BC,
        "advantages": torch.tensor(batch["advantages"]),
        "old_per_token_logps": padded(batch["behaviour_logprobs"]),
        "ref_per_token_logps": padded(batch["reference_logprobs"]),
        "num_items_in_batch": mask_BC.sum(),
    }


def case(formula: str, call: dict[str, Any], ours: Case, note: str = "", **answers: Any) -> Case:
    listed = ", ".join(f"{name}={value}" for name, value in call.items())
    return {"formula": formula, "call": listed, "note": note, "ours": ours, **answers}


def advantage_cases(batch: Batch) -> list[Case]:
    together = {**batch, "group_sizes": [len(batch["lengths"])]}
    centred = "TRL centres by group and scales by the batch; on one group that is our `batch`"
    cases = []
    for ours, scale, name, note in (
        ("grpo", "group", "ragged", ""),
        ("dr_grpo", "none", "ragged", ""),
        ("batch", "batch", "one_group", centred),
    ):
        one = together if name == "one_group" else batch
        advantages = trainer(one, scale_rewards=scale).score()["advantages"].tolist()
        cases.append(
            case(
                f"advantage {ours}",
                {"scale_rewards": scale},
                {"advantage": [ours, {}]},
                note,
                batch=name,
                advantages=grouped(short(advantages), one["group_sizes"]),
            )
        )
    return cases


def loss_cases(name: str, batch: Batch) -> list[Case]:
    """Losses with the ratio to mu: this project's options and the equivalent TRL options."""
    cases = []
    for formula, ours, options in (
        *aggregation_choices(),
        (
            "gspo",
            {"policy_loss": GSPO, "aggregation": AGGREGATIONS["grpo"]},
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": GSPO_CLIP},
        ),
        (
            "cispo (TRL's epsilon_high is our 1 + clip_high)",
            {"policy_loss": CISPO, "aggregation": AGGREGATIONS["dapo"]},
            {"loss_type": "cispo", "epsilon_high": 1 + CISPO_HIGH},
        ),
        (
            "ppo_clip with the dual clip (TRL's delta)",
            {
                "policy_loss": ["ppo_clip", PPO[1] | {"dual_clip": DUAL_CLIP}],
                "aggregation": AGGREGATIONS["dapo"],
            },
            {"loss_type": "dapo", "delta": DUAL_CLIP, **CLIPS},
        ),
        (
            "ppo_clip negative_sequence_mask",
            {
                "policy_loss": PPO,
                "aggregation": AGGREGATIONS["dapo"],
                "correction": ["negative_sequence_mask", {"max_negative_kl": MAX_NEGATIVE_KL}],
            },
            {"loss_type": "dapo", "off_policy_mask_threshold": MAX_NEGATIVE_KL, **CLIPS},
        ),
    ):
        answers = trainer(batch, **options).answers(loss_inputs(batch))
        cases.append(case(formula, options, {"correction": PLAIN, **ours}, batch=name, **answers))
    return cases


def aggregation_choices() -> list[tuple[str, Case, dict[str, Any]]]:
    return [
        (
            f"ppo_clip {loss_type}",
            {"policy_loss": PPO, "aggregation": aggregation},
            {"loss_type": loss_type, **CLIPS},
        )
        for loss_type, aggregation in AGGREGATIONS.items()
    ]


def importance_cases(batch: Batch) -> list[Case]:
    """Weights on pi / mu as TRL applies them between trainer and vLLM. The ratio of the loss
    itself is 1, so both the loss and its gradient are -w A."""
    high = {"max_ratio": MAX_RATIO}
    both = {"min_ratio": MIN_RATIO, **high}
    modes = {
        "token_truncate": ["token_tis", high],
        "token_mask": ["token_mask", both],
        "sequence_truncate": ["sequence_tis", high],
        "sequence_mask": ["sequence_mask", both],
    }
    cases = []
    for mode, correction in modes.items():
        options = {
            "use_vllm": True,
            "loss_type": "dapo",
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": MAX_RATIO,
            "vllm_importance_sampling_clip_min": MIN_RATIO if mode.endswith("mask") else None,
        }
        library = trainer(batch, **options)
        inputs = library.score() | {"advantages": torch.tensor(batch["advantages"])}
        ours = {"correction": correction, "policy_loss": PPO, "aggregation": ["token_mean", {}]}
        answers = {"batch": "ragged", **library.answers(inputs)}
        note = "the ratios of _generate_and_score_completions, through _compute_loss"
        cases.append(case(f"ppo_clip {correction[0]}", options, ours, note, **answers))
    return cases


def regularized_cases(batch: Batch) -> list[Case]:
    """The KL loss, on-policy because ours weights it by pi / mu, and the entropy bonus. TRL's
    `use_bias_correction_kl`, on by default, weights by a ratio with gradient."""
    cases = []
    for formula, name, one, options, ours in (
        (
            "ppo_clip kl k3",
            "on_policy",
            on_policy(batch),
            {"loss_type": "dapo", "beta": KL_COEFFICIENT, "use_bias_correction_kl": False},
            {
                "policy_loss": UNCLIPPED,
                "regularization": {"kl": "k3", "kl_coefficient": KL_COEFFICIENT},
            },
        ),
        (
            "ppo_clip entropy",
            "ragged",
            batch,
            {"loss_type": "dapo", "entropy_coef": ENTROPY_COEFFICIENT, **CLIPS},
            {"policy_loss": PPO, "regularization": {"entropy_coefficient": ENTROPY_COEFFICIENT}},
        ),
    ):
        answers = trainer(one, **options).answers(loss_inputs(one))
        ours = {"correction": PLAIN, "aggregation": AGGREGATIONS["dapo"], **ours}
        cases.append(case(formula, options, ours, batch=name, **answers))
    return cases


def truncated_cases(batch: Batch) -> list[Case]:
    """Advantages of all completions, gradient of the finished ones. Not the token means, whose
    divisors leave the truncated ones out in TRL."""
    cases = []
    for loss_type in ("grpo", "dr_grpo"):
        options = {"loss_type": loss_type, "mask_truncated_completions": True, **CLIPS}
        library = trainer(batch, **options)
        inputs = library.score()
        mu = {"old_per_token_logps": padded(batch["behaviour_logprobs"])}
        ours = {
            "advantage": ["grpo", {}],
            "correction": PLAIN,
            "policy_loss": PPO,
            "aggregation": AGGREGATIONS[loss_type],
            "mask_truncated": True,
        }
        advantages = grouped(short(inputs["advantages"].tolist()), batch["group_sizes"])
        answers = {"advantages": advantages, **library.answers(inputs | mu)}
        formula = f"ppo_clip {loss_type} mask_truncated"
        cases.append(case(formula, options, ours, batch="truncated", **answers))
    return cases


def overlong_case() -> Case:
    lengths = [0, 1, 79, 80, 81, 90, 99, 100, 101, 150]
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    return case(
        "soft_overlong_punishment",
        {"max_completion_len": 100, "soft_punish_cache": 20},
        {"overlong": {"max_length": 100, "buffer": 20}},
        lengths=lengths,
        punishments=punish(completion_ids=[[TOKEN] * n for n in lengths]),
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    batch = make_batch(21, group_sizes=[4, 4, 4])
    empty = make_batch(22, group_sizes=[4, 4], num_empty=1)
    cases = [
        overlong_case(),
        *advantage_cases(batch),
        *loss_cases("ragged", batch),
        *loss_cases("with_an_empty_completion", empty),
        *importance_cases(batch),
        *regularized_cases(batch),
        *truncated_cases(truncated(batch)),
    ]
    batches = {
        "ragged": batch,
        "one_group": {**batch, "group_sizes": [len(batch["lengths"])]},
        "with_an_empty_completion": empty,
        "on_policy": on_policy(batch),
        "truncated": truncated(batch),
    }
    save("trl", batches=batches, cases=cases)


if __name__ == "__main__":
    main()
