"""The `scripted` task for fault injection tests: each prompt has a fixed pass rate.

A completion passes when a hash of prompt and completion, as a fraction, is below the prompt's
`answer`, which is its pass rate. Verification thus processes real text deterministically and needs
no capable model.
"""

import hashlib

from speed_async.config.sections.task import TaskConfig
from speed_async.types import Prompt

PASS_RATES = (0.0, 0.25, 0.5, 0.5, 0.75, 1.0)
"""Pass rates of prompts 0, 1, 2, ..., repeated cyclically."""


def make_scripted_task(config: TaskConfig) -> "ScriptedTask":
    return ScriptedTask(num_prompts=config.num_prompts, num_held_out=config.num_held_out)


class ScriptedTask:
    """Implements `Task`. Prompts are six digits and `=`."""

    def __init__(self, *, num_prompts: int, num_held_out: int) -> None:
        self.train_prompts = _prompts(0, num_prompts, held_out=False)
        self.held_out_prompts = _prompts(num_prompts, num_held_out, held_out=True)

    def score(self, prompt: Prompt, completion: str) -> float:
        digest = hashlib.blake2b(f"{prompt.text}\0{completion}".encode(), digest_size=8).digest()
        return float(int.from_bytes(digest) < float(prompt.answer) * 2**64)

    def extract(self, completion: str) -> str | None:
        """Always None: the score depends on the whole text."""
        return None


def _prompts(start: int, count: int, *, held_out: bool) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            prompt_id=prompt_id,
            text=f"{start + prompt_id:06d}=",
            answer=str(rate := PASS_RATES[prompt_id % len(PASS_RATES)]),
            level=f"pass_rate={rate}",
            held_out=held_out,
        )
        for prompt_id in range(count)
    )
