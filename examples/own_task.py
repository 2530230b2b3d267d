"""A task of your own: additions with partial credit. `own_task.toml` names it by import path."""

from speed_async.config.sections.task import TaskConfig
from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.types import Prompt


class PartialCreditTask(ArithmeticTask):
    """The arithmetic task, with the share of correct leading digits as reward."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """Reward in [0, 1]. A completion counts as passed (for the gate) at 1.0."""
        if completion.strip() == prompt.answer:
            return 1.0
        pairs = list(zip(completion.strip(), prompt.answer, strict=False))
        num_correct = next((i for i, (given, right) in enumerate(pairs) if given != right), 0)
        return 0.5 * num_correct / len(prompt.answer)


def make_task(config: TaskConfig) -> PartialCreditTask:
    """Called in every process that needs the task, with the section `[task]`."""
    return PartialCreditTask(
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        max_digits=config.max_digits,
        seed=config.seed,
    )
