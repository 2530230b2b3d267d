"""The task of the experiment: a completion passes only if its text equals the answer.

The built-in tasks also accept other texts of the same value, such as `05` for `5`. Their pass rate
is not the probability of one token string.
"""

import json
from pathlib import Path

from speed_async.config.sections.task import TaskConfig
from speed_async.types import Prompt


class LiteralTask:
    """Prompts of the file `task.path`. The first `task.num_held_out` lines are held out."""

    def __init__(self, config: TaskConfig) -> None:
        """ValueError if `task.path` is not set."""
        if config.path is None:
            raise ValueError("task.path is not set: give the file of the prompts")
        rows = [json.loads(line) for line in Path(config.path).read_text().splitlines()]
        num_held_out = config.num_held_out
        self.held_out_prompts = as_prompts(rows[:num_held_out], held_out=True)
        self.train_prompts = as_prompts(rows[num_held_out:])

    def score(self, prompt: Prompt, completion: str) -> float:
        return float(completion == prompt.answer)

    def extract(self, completion: str) -> str | None:
        return completion


def as_prompts(rows: list[dict[str, str]], *, held_out: bool = False) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=index,
            text=row["prompt"],
            answer=row["answer"],
            level=row["level"],
            held_out=held_out,
        )
        for index, row in enumerate(rows)
    ]
