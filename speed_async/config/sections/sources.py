"""A source of prompts: a file, a prepared folder, or a data set of the Hugging Face hub."""

from pydantic import Field

from speed_async.config.sections.section import PositiveFloat, Section

PROMPT_FORMAT = "{prompt}"


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
    braces by its value; other braces are kept, as in `\\boxed{}`."""


class TaskSource(SourceConfig):
    """One of several sources of training prompts (`[[task.sources]]`)."""

    weight: PositiveFloat | None = None
    """Share of this source in the training prompts, relative to the weights of the others. None,
    which then applies to all sources: each prompt occurs once."""
