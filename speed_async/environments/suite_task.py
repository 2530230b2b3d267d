"""Scores the completions of an evaluation suite. It has no prompts of its own."""

from speed_async.environments.matching import MatchedTask
from speed_async.types import Prompt


class SuiteTask(MatchedTask):
    """A `Task` for the verifier pool: the final answer is compared with that of the prompt."""

    train_prompts: tuple[Prompt, ...] = ()
    held_out_prompts: tuple[Prompt, ...] = ()
