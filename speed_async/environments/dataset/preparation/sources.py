"""The published data sets that `speed-async data prepare` knows."""

import difflib
from dataclasses import dataclass
from typing import Literal

from speed_async.errors import DataError

Role = Literal["training", "evaluation"]
Part = Literal["all", "rest", "held out"]

HELD_OUT_SEED = 17
NUM_HELD_OUT = 1000
_CONTEST = "none stated by the publisher (problems of the Mathematical Association of America)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a data set is published, and what is done with it."""

    name: str
    role: Role
    hub: str
    """Its id on the Hugging Face hub."""
    config: str | None = None
    """The configuration on the hub; None for the only one."""
    split: str
    licence: str
    part: Part = "all"
    """DAPO is divided by HELD_OUT_SEED: `held out` is for evaluation, `rest` for training."""
    integers_only: bool = False
    """Keep only rows whose answer is an integer and whose problem asks for no proof."""
    drops_near_duplicates: bool = False
    """Whether near duplicates are dropped; they are counted in any case."""

    @property
    def file_name(self) -> str:
        """Of the prepared rows."""
        return "train.parquet" if self.role == "training" else "test.parquet"


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="gsm8k",
            role="training",
            hub="openai/gsm8k",
            config="main",
            split="train",
            licence="MIT",
            drops_near_duplicates=True,
        ),
        Source(
            name="math",
            role="training",
            hub="DigitalLearningGmbH/MATH-lighteval",
            split="train",
            licence="MIT",
            drops_near_duplicates=True,
        ),
        Source(
            name="deepscaler",
            role="training",
            hub="agentica-org/DeepScaleR-Preview-Dataset",
            split="train",
            licence="MIT",
            drops_near_duplicates=True,
        ),
        Source(
            name="dapo17k",
            role="training",
            hub="BytedTsinghua-SIA/DAPO-Math-17k",
            split="train",
            licence="Apache-2.0",
            part="rest",
        ),
        Source(
            name="numinamath",
            role="training",
            hub="AI-MO/NuminaMath-CoT",
            split="train",
            licence="Apache-2.0",
            integers_only=True,
            drops_near_duplicates=True,
        ),
        Source(
            name="gsm8k-test",
            role="evaluation",
            hub="openai/gsm8k",
            config="main",
            split="test",
            licence="MIT",
        ),
        Source(
            name="math500",
            role="evaluation",
            hub="HuggingFaceH4/MATH-500",
            split="test",
            licence="MIT",
        ),
        Source(
            name="amc23", role="evaluation", hub="math-ai/amc23", split="test", licence=_CONTEST
        ),
        Source(
            name="aime24", role="evaluation", hub="math-ai/aime24", split="test", licence=_CONTEST
        ),
        Source(
            name="aime25", role="evaluation", hub="math-ai/aime25", split="test", licence=_CONTEST
        ),
        Source(
            name="dapo1k",
            role="evaluation",
            hub="BytedTsinghua-SIA/DAPO-Math-17k",
            split="train",
            licence="Apache-2.0",
            part="held out",
        ),
    )
}


def find_source(name: str) -> Source:
    """Raises DataError for a name that is not in SOURCES."""
    if name in SOURCES:
        return SOURCES[name]
    close = difflib.get_close_matches(name, SOURCES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise DataError(
        f"NAME = {name!r}: unknown data set{hint}; known data sets are {', '.join(SOURCES)}"
    )
