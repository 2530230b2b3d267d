"""`[objective]`: advantages, losses and corrections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from speed_async.config.extensions import part_name
from speed_async.config.presets import RATIO_LIMITS
from speed_async.config.sections.section import Fraction, PositiveFloat, Section

ADVANTAGES = ("rloo", "shrunken", "grpo", "dr_grpo", "batch")
ACROSS_GROUPS = ("shrunken", "batch")
"""Advantages that compare groups: a group with equal rewards, or of one completion, teaches too."""
POLICY_LOSSES = ("policy_gradient", "ppo_clip", "cispo", "gspo")


class ObjectiveConfig(Section):
    """The objective. `algorithm` sets these fields; a value set here overrides the preset."""

    advantage: Annotated[str, part_name("advantage", *ADVANTAGES)] = "rloo"
    """`rloo`, `shrunken`, `grpo`, `dr_grpo` or `batch` (algorithms/advantages.py), or
    `<module>:<function>`."""
    prior_weight: PositiveFloat = 2.0
    """Weight of the mean reward of the other groups of the update in the baseline of `shrunken`, in
    completions of the own group."""
    policy_loss: Annotated[str, part_name("policy_loss", *POLICY_LOSSES)] = "ppo_clip"
    """`policy_gradient`, `ppo_clip`, `cispo` or `gspo` (algorithms/losses.py), or
    `<module>:<function>`. All except `policy_gradient` use the importance ratio to the behaviour
    policy. `policy_gradient` needs a `correction` unless all data is on-policy."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    """Ratios outside of [1 - clip_low, 1 + clip_high] have no gradient (cispo: the ratio is capped
    at the upper limit)."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """`ppo_clip` and `gspo`: ratios above this value have no gradient at negative advantages (c of
    dual-clip PPO). A very large value disables it."""
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "fixed_length"] = (
        "token_mean"
    )
    """Aggregation of token losses: equal weight per token, per completion or per prompt.
    `fixed_length` divides by completions x actors.max_new_tokens, or by the context if that is less
    (Dr. GRPO)."""
    correction: Literal[
        "none",
        "token_tis",
        "sequence_tis",
        "sequence_snis",
        "geometric_tis",
        "token_mask",
        "sequence_mask",
        "geometric_mask",
        "probability_mask",
        "negative_sequence_mask",
    ] = "none"
    """Off-policy correction for tokens sampled by an older policy mu (algorithms/corrections.py):
    the ratio pi_theta / mu of the token, of its sequence, or the geometric mean over the sequence,
    truncated (`tis`, `snis`) or masked outside of limits."""
    min_ratio: Annotated[float, Field(ge=0)] | None = None
    """`token_mask`, `sequence_mask` and `geometric_mask` keep ratios in [min_ratio, max_ratio].
    None: the default of the correction (config/presets.py)."""
    max_ratio: PositiveFloat | None = None
    """Largest ratio of every correction that uses ratios; None: the default of the correction."""
    max_probability_change: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`probability_mask` drops a token whose probability has changed by more than this value in the
    direction of its gradient."""
    max_negative_kl: PositiveFloat = 0.1
    """`negative_sequence_mask` drops a completion with negative advantage if its mean
    log(mu / pi_theta) exceeds this value."""
    overlong_share: Fraction = 0.0
    """Last share of the length limit in which the reward decreases linearly; 0 disables it. The
    limit is actors.max_new_tokens, or the context minus the prompt if that is less."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Reduction of the reward at the limit."""
    mask_truncated: bool = False
    """Take completions that a length limit truncated out of the gradient (overlong filtering of
    DAPO). Their rewards remain in the baselines."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the KL divergence from the start model (`model.path`); 0 disables it. It keeps a
    second copy of the model, unless adapters are trained."""
    kl: Literal["k1", "k2", "k3"] = "k2"
    """Estimator of the KL divergence (algorithms/regularization.py). `k1`: subtracted from the
    reward, summed over the completion. `k2`, `k3`: added to the loss of each token."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the entropy that is subtracted from the loss of each token."""
    screening_samples: Literal["all", "unbiased", "none"] = "all"
    """Screening samples that enter the gradient (all are used in baselines). The gate depends on
    these samples: `unbiased` drops those whose flipped reward would flip the gate decision."""

    @model_validator(mode="before")
    @classmethod
    def _with_ratio_limits(cls, values: object) -> object:
        """Fills `min_ratio` and `max_ratio` that are not set."""
        if not isinstance(values, dict):
            return values
        limits = RATIO_LIMITS.get(str(values.get("correction")), {})
        return values | {name: limits[name] for name in limits if values.get(name) is None}
