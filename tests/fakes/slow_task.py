"""The arithmetic task with a slow verifier, for runs that wait for other processes. Meanwhile they
take little CPU time, and they are not over before these have started."""

import time

from speed_async.config.sections.task import TaskConfig
from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.types import Prompt

SCORE_S = 0.005
SLOW = ("--task.name", "tests.fakes.slow_task:SlowTask", "--run.updates", "100000")


class SlowTask(ArithmeticTask):
    def __init__(self, config: TaskConfig) -> None:
        super().__init__(
            num_prompts=config.num_prompts,
            num_held_out=config.num_held_out,
            max_digits=config.max_digits,
            seed=config.seed,
        )

    def score(self, prompt: Prompt, completion: str) -> float:
        time.sleep(SCORE_S)
        return super().score(prompt, completion)
