"""`[task]`: prompts, answers and rewards."""

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from speed_async.config.extensions import part_name, registered_path
from speed_async.config.sections.section import NonNegativeInt, PositiveInt, Section
from speed_async.config.sections.sources import PROMPT_FORMAT, TaskSource

REWARDS = ("correct", "boxed", "answer_tag", "overlong")
Reward = Annotated[float, Field(ge=-1e6, le=1e6)]  # MAX_REWARD of types.py, which needs numpy


class RewardConfig(Section):
    """One of several rewards (`[[task.rewards]]`)."""

    name: Annotated[str, part_name("reward", *REWARDS)]
    """As `task.reward`."""
    weight: float = 1.0
    """Its factor in the sum. May be negative, for a penalty."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name.rpartition(":")[2]


class TaskConfig(Section):
    name: Annotated[str, AfterValidator(partial(registered_path, "task"))]
    """`arithmetic`, `dataset`, `jsonl`, `reasoning_gym:<data set>`, `verifiers:<environment>`, or
    `<module>:<callable>`.
    `scripted` is for fault injection tests: each prompt passes at random with its own rate."""
    path: str | None = None
    """Data file of `jsonl`: one object per line with `prompt` and `answer`. Source of `dataset`:
    prepared folder, file, or hub data set (docs/data.md)."""
    split: str | None = None
    """Split of `path` (`dataset`); None: `train`."""
    subset: str | None = None
    """Subset of the hub data set `path` (`dataset`)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of `path` (`dataset`), as in `task.sources`."""
    format: str = PROMPT_FORMAT
    """Text that the model gets (`dataset`), as in `task.sources`."""
    sources: list[TaskSource] = Field(default_factory=list)
    """Sources of `dataset`, mixed by weight, instead of `path`: `[[task.sources]]`."""
    match: Literal["exact", "numeric", "math"] = "exact"
    """How `jsonl` and `dataset` compare the final answer of a completion with that of the row.
    `exact`: as text, ignoring spacing (rules: environments/exact_answer.py). `numeric`: as numbers;
    a row whose answer is not one whole number is rejected (environments/whole_number.py). `math`:
    as values of mathematical expressions, exactly, then by math-verify (docs/verifier.md)."""
    reward: Annotated[str, part_name("reward", *REWARDS)] = "correct"
    """`correct`: the task's own score. `boxed`, `answer_tag`: format only
    (environments/format_rewards.py). `<module>:<function>`: a function of prompt, completion,
    answer and metadata (docs/extending.md)."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """Several rewards, `[[task.rewards]]` with `name` and `weight`; the reward is their weighted
    sum. What passes is decided by `correct` if it is one of them, else by the first one."""
    score_truncated: bool = False
    """Whether a completion truncated by a length limit is scored like any other. False: it does not
    pass, in training and evaluation, and its reward is `truncated_reward`, whatever its text."""
    truncated_reward: Reward = 0.0
    """Reward of a truncated completion that is not scored (`score_truncated`)."""
    num_prompts: PositiveInt = 4096
    """Number of training prompts to generate (tasks that generate prompts), or to use at most
    (`verifiers:<environment>`)."""
    max_prompt_tokens: PositiveInt | None = None
    """Training prompts with more tokens (chat template included) are not trained on; None: only
    those that do not fit into the context are left out."""
    long_prompts: Literal["leave_out", "error"] = "leave_out"
    """What a training prompt over `max_prompt_tokens` or the context means: it is left out and
    counted, or the checks before a run fail. They read a sample of many prompts; a prompt that they
    missed is left out."""
    num_held_out: PositiveInt = 256
    """Prompts held out for evaluation and never trained on."""
    max_digits: PositiveInt = 6
    """Hardest level of `arithmetic`."""
    options: dict[str, object] = Field(default_factory=dict)
    """Passed to the reasoning-gym data set, or to `load_environment` of the verifiers
    environment."""
    python: str | None = None
    """Interpreter that has `verifiers` and the environment (`verifiers:<environment>`); None: that
    of the run."""
    seed: NonNegativeInt = 0
    """Seed of the data, separate from `run.seed` so that runs can share their data."""

    @property
    def weighted_rewards(self) -> tuple[RewardConfig, ...]:
        """`rewards`, or `reward` alone."""
        return tuple(self.rewards) or (RewardConfig(name=self.reward),)

    @property
    def all_sources(self) -> list[TaskSource]:
        """Sources of `dataset`: those of `sources`, or the one of `path`."""
        if self.path is None:
            return self.sources
        source = TaskSource(
            path=self.path,
            split=self.split,
            subset=self.subset,
            columns=self.columns,
            format=self.format,
        )
        return [source]
