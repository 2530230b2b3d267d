"""Presets for each `algorithm`; the resolved config has all fields.

Every algorithm keeps surplus accepted groups for the next update. Every algorithm can run
asynchronously: the clipped losses use the importance ratio to the behaviour policy. On-policy,
`rloo` is the plain policy gradient: with one update per batch, nothing is clipped.
"""

from collections.abc import Mapping
from typing import Any

Parts = dict[str, dict[str, Any]]

RLOO = {
    "advantage": "rloo",
    "policy_loss": "ppo_clip",
    "clip_high": 0.28,
    "aggregation": "token_mean",
    "correction": "none",
}
GRPO = {
    "advantage": "grpo",
    "policy_loss": "ppo_clip",
    "clip_high": 0.2,
    "aggregation": "sequence_mean",
    "correction": "none",
}
DR_GRPO = GRPO | {"advantage": "dr_grpo", "aggregation": "fixed_length"}
REINFORCE_PP = GRPO | {"advantage": "batch", "aggregation": "token_mean"}
CISPO = GRPO | {"policy_loss": "cispo", "aggregation": "token_mean", "clip_high": 4.0}
GSPO = GRPO | {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
DAPO = GRPO | {"aggregation": "token_mean", "clip_high": 0.28, "overlong_share": 1 / 6}

SPEED_DAPO = DAPO | {"screening_samples": "unbiased"}
"""The overlong penalty adds a third reward value. Training on all screening samples then changes
the direction of the gradient of a prompt (docs/algorithms.md). `unbiased` takes out that bias. With
GRPO's division it is exact for binary rewards only: the bias of the division remains."""

RATIO_LIMITS: Mapping[str, Mapping[str, float]] = {
    "token_tis": {"max_ratio": 2.0},
    "sequence_tis": {"max_ratio": 2.0},
    "sequence_snis": {"max_ratio": 2.0},
    "geometric_tis": {"max_ratio": 2.0},
    "token_mask": {"min_ratio": 0.5, "max_ratio": 5.0},
    "sequence_mask": {"min_ratio": 0.5, "max_ratio": 2.0},
    "geometric_mask": {"min_ratio": 0.999, "max_ratio": 1.001},
    "probability_mask": {"max_ratio": 20.0},
}
"""Defaults of `objective.min_ratio` and `max_ratio` by correction. `token_mask`: IcePop;
`geometric_mask`: verl; `probability_mask`: DPPO."""

PRESETS: Mapping[str, Parts] = {
    "rloo": {
        "gate": {"mode": "off", "n_init": 4, "n_cont": 0},
        "objective": RLOO,
        "learner": {"groups_per_update": 96},  # as many completions as 16 groups of 4 + 20
    },
    "grpo": {"gate": {"mode": "off"}, "objective": GRPO},
    "dr-grpo": {"gate": {"mode": "off"}, "objective": DR_GRPO},
    "reinforce++": {"gate": {"mode": "off"}, "objective": REINFORCE_PP},
    "cispo": {"gate": {"mode": "off"}, "objective": CISPO},
    "gspo": {"gate": {"mode": "off"}, "objective": GSPO},
    "dapo": {"gate": {"mode": "filter"}, "objective": DAPO},
    "speed-rloo": {"gate": {"mode": "screen"}, "objective": RLOO},
    "speed-dapo": {"gate": {"mode": "screen"}, "objective": SPEED_DAPO},
}


def with_preset(tree: dict[str, Any], default: str) -> dict[str, Any]:
    """Apply the preset of `tree["algorithm"]`; values in `tree` take precedence.

    The schema rejects unknown names, and sections that are not tables, later.
    """
    name = tree.get("algorithm", default)
    merged = dict(tree)
    for section, parts in PRESETS.get(name, {}).items() if isinstance(name, str) else ():
        given = tree.get(section, {})
        if isinstance(given, dict):
            merged[section] = parts | given
    return merged
