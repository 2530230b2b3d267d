"""Settings that the other values of the configuration leave without effect.

A field counts as set if its value is neither its default nor that of the preset. Not checked are
`actors.vllm` and `task.max_digits`: nobody expects them to act on another engine or task, and an
override selects one without a change of the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from speed_async.config.checks.task import BUILT_IN, LIBRARIES, library_of
from speed_async.config.names import all_sections
from speed_async.config.presets import PRESETS, RATIO_LIMITS
from speed_async.config.schema import Config
from speed_async.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """Fields that have an effect in some configurations only."""

    fields: str
    """Separated by spaces."""
    applies: Callable[[Config], bool]
    condition: str
    """`applies` in words."""


def _for_tasks(fields: str, *names: str) -> _Use:
    condition = " or ".join(f"'{each}:...'" if each in LIBRARIES else f"'{each}'" for each in names)
    return _Use(
        fields=fields,
        applies=lambda c: _kind_of_task(c.task.name) in (*names, None),
        condition=f"task.name = {condition}",
    )


def _with(setting: str, *values: str, fields: str) -> _Use:
    return _Use(
        fields=fields,
        applies=lambda c: _value(c, setting) in values,
        condition=f"{setting} = {_choices(values)}",
    )


def _value(config: Config, field: str) -> Any:
    return reduce(getattr, field.split("."), config)


def _choices(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{each}'" for each in names)


def _limited_by(limit: str) -> tuple[str, ...]:
    return tuple(name for name, limits in RATIO_LIMITS.items() if limit in limits)


USES = (
    _for_tasks("task.path task.match", "dataset", "jsonl"),
    _for_tasks("task.sources task.split task.subset task.columns task.format", "dataset"),
    _for_tasks("task.num_prompts", "arithmetic", *LIBRARIES),
    _for_tasks("task.options", *LIBRARIES),
    _for_tasks("task.python", "verifiers"),
    _Use(
        fields="task.truncated_reward",
        applies=lambda c: not c.task.score_truncated,
        condition="task.score_truncated = false",
    ),
    _Use(
        fields="model.system_prompt model.template_arguments",
        applies=lambda c: c.model.chat_template,
        condition="model.chat_template = true",
    ),
    _Use(
        fields="gate.low gate.high",
        applies=lambda c: c.gate.mode != "off",
        condition="a gate (algorithm = 'speed-rloo' or 'dapo', or gate.mode)",
    ),
    _with(
        "curriculum.kind",
        "posterior",
        fields="curriculum.half_life_updates curriculum.uniform_share curriculum.candidates",
    ),
    _with("buffer.durability", "batched", "every", fields="buffer.spill"),
    _with("learner.lr_schedule", "linear", "cosine", fields="learner.min_lr_share"),
    _Use(
        fields="learner.lora_alpha",
        applies=lambda c: c.learner.lora_rank > 0,
        condition="learner.lora_rank above 0",
    ),
    _with("objective.advantage", "shrunken", fields="objective.prior_weight"),
    _with("objective.policy_loss", "ppo_clip", "gspo", fields="objective.clip_low"),
    _with("objective.policy_loss", "ppo_clip", "cispo", "gspo", fields="objective.clip_high"),
    _with("objective.policy_loss", "ppo_clip", "gspo", fields="objective.dual_clip"),
    _with("objective.correction", *_limited_by("min_ratio"), fields="objective.min_ratio"),
    _with("objective.correction", *_limited_by("max_ratio"), fields="objective.max_ratio"),
    _with("objective.correction", "probability_mask", fields="objective.max_probability_change"),
    _with("objective.correction", "negative_sequence_mask", fields="objective.max_negative_kl"),
    _Use(
        fields="objective.overlong_penalty",
        applies=lambda c: c.objective.overlong_share > 0,
        condition="objective.overlong_share above 0",
    ),
    _Use(
        fields="objective.kl",
        applies=lambda c: c.objective.kl_coefficient > 0,
        condition="objective.kl_coefficient above 0",
    ),
    _Use(
        fields="cluster.keys",
        applies=lambda c: c.cluster.uses_curve,
        condition="cluster.security = 'curve', or 'auto' and a cluster.host that is no loopback "
        "address",
    ),
    _Use(
        fields="observe.wandb_project",
        applies=lambda c: c.observe.wandb,
        condition="observe.wandb = true",
    ),
)


def check_unused(config: Config) -> Iterator[ConfigError]:
    """Yield an error for every field that is set and has no effect."""
    for use in USES:
        if use.applies(config):
            continue
        for field in use.fields.split():
            value = _value(config, field)
            if value != _unset(config, field):
                yield ConfigError(
                    field,
                    f"{len(value)} sources" if field == "task.sources" else value,
                    f"has an effect only with {use.condition}; set that, or remove this setting",
                )


def _unset(config: Config, field: str) -> Any:
    """The value of the field if neither the file nor an override sets it."""
    section, _, name = field.rpartition(".")
    default = all_sections()[section].model_fields[name].get_default(call_default_factory=True)
    return PRESETS[config.algorithm].get(section, {}).get(name, default)


def _kind_of_task(name: str) -> str | None:
    """Name of a built-in task, without its data set; None for a task that gets all of `[task]`."""
    return library_of(name) or (name if name in BUILT_IN else None)
