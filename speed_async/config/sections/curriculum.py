"""`[curriculum]`: which prompts are sampled."""

from typing import Annotated, Literal

from pydantic import Field

from speed_async.config.sections.section import PositiveFloat, PositiveInt, Section


class CurriculumConfig(Section):
    kind: Literal["uniform", "posterior"] = "uniform"
    """`uniform`: shuffled epochs. `posterior`: Thompson sampling of the prompts most likely to pass
    the gate, or without one, to get a group whose rewards differ."""
    half_life_updates: PositiveFloat = 40.0
    """Updates after which the weight of an outcome is halved, because the policy changes."""
    uniform_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of prompts chosen in shuffled order regardless of their statistics, to avoid
    starvation."""
    candidates: PositiveInt = 4
    """Candidates per selected prompt. Larger values are greedier and repeat prompts sooner."""
