# pyright: reportMissingImports=false
"""TRL's RLOOTrainer on given groups, for benchmarks/learner_arm.py: only its training step."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from benchmarks.harness import QUICKSTART
from benchmarks.trl_arm import ON_CPU
from speed_async.types import Group


class GivenCompletions(RLOOTrainer):
    """Instead of generating, takes the completions of the groups. A prompt's text is its index."""

    groups: Sequence[Group]

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        counts = dict.fromkeys(prompts, 0)
        prompt_ids, completion_ids = [], []
        for prompt in prompts:
            group = self.groups[int(prompt)]
            prompt_ids.append(group.prompt_token_ids.tolist())
            sampled = group.completions[counts[prompt]].sampled
            completion_ids.append(sampled.token_ids.tolist())
            counts[prompt] += 1
        return prompt_ids, completion_ids, ["" for _ in prompts]


class SecondStep(TrainerCallback):
    """Measures the second step: the first one allocates the optimizer state."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 1:
            self._begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 2:
            self._end()


def train(
    folder: Path,
    groups: Sequence[Group],
    micro_batch: int,
    *,
    begin: Callable[[], None],
    end: Callable[[], None],
) -> None:
    """Two steps with all groups. `begin` and `end` are called around the second."""
    group_size = len(groups[0].completions)
    with tempfile.TemporaryDirectory() as output:
        arguments = RLOOConfig(
            output_dir=output,
            max_steps=2,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(groups) * group_size // micro_batch,
            num_generations=group_size,
            max_completion_length=max(c.num_tokens for g in groups for c in g.completions),
            beta=0.0,
            learning_rate=1e-6,
            **ON_CPU,
        )
        trainer = GivenCompletions(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(groups))]}),
            processing_class=AutoTokenizer.from_pretrained(QUICKSTART.parent / "model"),
            callbacks=[SecondStep(begin, end)],
        )
        trainer.groups = groups
        trainer.train()
