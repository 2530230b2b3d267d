"""`[evaluate]`: prompts that are never trained on, and how they are sampled and scored."""

from typing import Annotated, Literal

from pydantic import Field

from speed_async.config.sections.section import NonNegativeInt, PositiveInt, Section
from speed_async.config.sections.sources import SourceConfig

HELD_OUT = "held_out"
"""Name of the suite of the task's own held-out prompts, which every run has."""


class SuiteConfig(SourceConfig):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name in metrics and files: letters, digits, `_`, `.` and `-`."""
    match: Literal["exact", "numeric", "math"] = "math"
    """How the final answer of a completion is compared with that of the row (`task.match`)."""
    samples: PositiveInt = 1
    """Completions per prompt: k of mean@k. One that a length limit truncates is scored by its
    text."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this probability."""
    every: NonNegativeInt = 20
    """Updates between evaluations in training; 0 runs only the first and the last."""
    num_prompts: PositiveInt | None = None
    """Use only the first prompts of the source; None: all."""


class EvaluateConfig(Section):
    """`every` and `num_samples` are those of the task's own held-out prompts, which are the suite
    `held_out`."""

    every: NonNegativeInt = 20
    """Updates between held-out evaluations; 0 runs only the first and the last."""
    num_samples: PositiveInt = 1
    """Completions per held-out prompt, at the temperature of the actors."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.025
    """Tokens of evaluations relative to those generated for training so far. Beyond it, evaluations
    wait, which bounds how much they delay training. The first evaluation of each suite and the last
    ones are not counted, nor any without `run.overlap`, where updates wait for evaluations."""
    suites: list[SuiteConfig] = Field(default_factory=list)
    """Suites evaluated in training besides the held-out prompts."""
