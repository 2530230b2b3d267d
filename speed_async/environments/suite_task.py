"""Scores the completions of an evaluation suite. It has no prompts of its own."""

from speed_async.environments.matching import MatchKind, matching
from speed_async.types import Prompt


class SuiteTask:
    """A `Task` for the verifier pool: the final answer is compared with that of the prompt."""

    train_prompts: tuple[Prompt, ...] = ()
    held_out_prompts: tuple[Prompt, ...] = ()

    def __init__(self, match: MatchKind) -> None:
        self._matching = matching(match)

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 when the completion's final answer matches, else 0.0. "math" may raise or hang."""
        return float(self._matching.is_correct(completion, prompt.answer))

    def extract(self, completion: str) -> str | None:
        """The final answer as written in the completion, whether it can be parsed or not."""
        return self._matching.extract(completion)
