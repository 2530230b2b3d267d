"""A source of prompts: a file, a prepared folder, or a data set of the Hugging Face hub."""

import re

from pydantic import Field

from speed_async.config.sections.section import PositiveFloat, Section

PROMPT_FORMAT = "{prompt}"
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_LATEX = re.compile(r"(?:\\[A-Za-z]+|[\^_])(?:\{(?!prompt\})[^{}]*\})+")
"""A command or a script with its arguments: `\\boxed{x}`, `\\frac{a}{b}`, `x^{n}`."""


def names_in(text: str) -> list[str]:
    """The names in braces of a format, `prompt` included; those of LaTeX arguments are no names."""
    return PLACEHOLDER.findall(_LATEX.sub("", text))


class SourceConfig(Section):
    path: str
    """Folder written by `speed-async data prepare`, a file (parquet, JSON array, JSON lines, CSV;
    also compressed), or a data set of the Hugging Face hub as `org/name`."""
    split: str | None = None
    """Split of a hub data set, or of a folder that has several; None: `train`."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column of `prompt` and of `answer`, and of `level` if there is one; empty: recognised by
    their names. Other keys are passed to the verifier as metadata."""
    format: str = PROMPT_FORMAT
    """Text that the model gets. `{prompt}` is replaced by the prompt, and the name of any column in
    braces by its value. Other names in braces are errors, except in LaTeX, as in `\\boxed{x}`."""


class TaskSource(SourceConfig):
    """One of several sources of training prompts (`[[task.sources]]`)."""

    weight: PositiveFloat | None = None
    """Share of this source in the training prompts, relative to the weights of the others. None,
    which then applies to all sources: each prompt occurs once."""
