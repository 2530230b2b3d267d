"""What each `algorithm` stands for: parts of `gate` and `objective`; the resolved config has all.

Every algorithm keeps the surplus of accepted groups for the next update, and every one may run
asynchronously: the clipped losses take their ratio to the policy that sampled. On-policy, `rloo`
is the plain policy gradient: with one update a batch, nothing is clipped.
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
"""Over-long punishment makes a third reward value, under which training on all screening samples
turns the gradient of a prompt (docs/algorithms.md)."""

PRESETS: Mapping[str, Parts] = {
    "rloo": {"gate": {"mode": "off"}, "objective": RLOO},
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
    """`tree` over the preset it names; a name that is none, or a section that is no table, is
    left for the schema to refuse."""
    name = tree.get("algorithm", default)
    merged = dict(tree)
    for section, parts in PRESETS.get(name, {}).items() if isinstance(name, str) else ():
        given = tree.get(section, {})
        if isinstance(given, dict):
            merged[section] = parts | given
    return merged
