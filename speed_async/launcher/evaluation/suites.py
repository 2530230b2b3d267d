"""The suites of an evaluation: their prompts, how these are sampled, and how they are scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import HELD_OUT, SuiteConfig
from speed_async.config.sections.sources import PROMPT_FORMAT
from speed_async.config.sections.task import RewardConfig
from speed_async.environments.dataset.rows import open_source, summary
from speed_async.environments.matching import MatchKind
from speed_async.environments.registry import make_task
from speed_async.environments.rewards import CORRECT
from speed_async.environments.scoring_source import scoring_files
from speed_async.environments.suite_task import SuiteTask
from speed_async.environments.suites import suite_prompts
from speed_async.environments.task import Task, prompts_digest
from speed_async.environments.verifier_worker import MakeTask
from speed_async.launcher.identity.content import digest_files, digest_text
from speed_async.types import Prompt

_PLACEHOLDER = "{prompt}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A suite that is ready to be sampled."""

    name: str
    prompts: Sequence[Prompt]
    format: str
    """Text that the model gets; `{prompt}` stands for the prompt."""
    num_samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    score_truncated: bool
    """False: a completion that ended by a length limit does not pass, whatever its text."""
    match: MatchKind
    """Which answers are equal in a vote."""
    make_task: MakeTask
    """Picklable; makes the scorer in the worker processes."""
    rewards: Sequence[RewardConfig] = CORRECT
    """Those of a run for its held-out prompts; `passed` is what counts."""
    verifier_digest: str
    note: str = ""
    """What the user should know about its rows."""

    def text(self, prompt: Prompt) -> str:
        return self.format.replace(_PLACEHOLDER, prompt.text)

    def settings(self) -> dict[str, Any]:
        """What its samples depend on, besides the model: plain JSON values."""
        return {
            "suite": self.name,
            "suite_digest": prompts_digest(self.prompts),
            "num_prompts": len(self.prompts),
            "format": self.format,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "score_truncated": self.score_truncated,
            "match": self.match,
            "verifier": self.verifier_digest,
        }


def open_suite(config: SuiteConfig, *, format: str, max_new_tokens: int) -> Suite:
    """The suite of a configuration section. Raises DataError when its source cannot be read.

    `config.format` is applied by the source, `format` to the result, so that the digest of the
    prompts does not depend on the latter: evaluations with different protocols can be compared.
    """
    rows = open_source(config, config.match)
    make = partial(SuiteTask, config.match)
    return Suite(
        name=config.name,
        prompts=suite_prompts(rows, config.num_prompts),
        format=format,
        num_samples=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=max_new_tokens,
        score_truncated=True,
        match=config.match,
        make_task=make,
        verifier_digest=_verifier_digest(make()),
        note=f"{config.name}: {summary(config.path, rows.report)}" if rows.report.unusable else "",
    )


def held_out_suite(config: Config) -> Suite:
    """The held-out prompts of a run, sampled and scored as in training."""
    make = partial(make_task, config.task)
    task = make()
    uses_match = config.task.name in ("jsonl", "dataset")
    return Suite(
        name=HELD_OUT,
        prompts=task.held_out_prompts,
        format=PROMPT_FORMAT,
        num_samples=config.evaluate.num_samples,
        temperature=config.actors.temperature,
        top_p=1.0,
        max_new_tokens=config.actors.max_new_tokens,
        score_truncated=config.task.score_truncated,
        match=config.task.match if uses_match else "exact",
        make_task=make,
        rewards=config.task.weighted_rewards,
        verifier_digest=_verifier_digest(task),
    )


def _verifier_digest(task: Task) -> str:
    """Digest of the scoring code."""
    return digest_text(*sorted(each.digest for each in digest_files(scoring_files(task)).values()))
