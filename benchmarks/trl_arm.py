"""TRL's RLOOTrainer on the quickstart's task: one process, one JSON line of step times at the end.

Started by benchmarks/trl.py; the settings are those under which TRL is fastest here.
"""

import argparse
import json
import sys
import tempfile
import time
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

from speed_async.config.load import load_config
from speed_async.config.schema import Config
from speed_async.tasks.registry import make_task
from speed_async.tasks.task import Task


class StepTimes(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ends_s.append(time.perf_counter())


def make_trainer(
    config: Config, task: Task, *, micro_batch: int, num_steps: int, folder: str
) -> tuple[RLOOTrainer, StepTimes]:
    group_size = config.gate.group_size
    num_completions = group_size * config.learner.groups_per_update
    num_micro_batches = num_completions // micro_batch
    arguments = RLOOConfig(
        output_dir=folder,
        max_steps=num_steps,
        # One generation of all completions, then micro-batches of them, then one step.
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_micro_batches,
        num_generations=group_size,
        max_completion_length=config.actors.max_new_tokens,
        temperature=config.actors.temperature,
        top_p=config.actors.top_p,
        top_k=0,
        beta=0.0,
        learning_rate=config.learner.lr,
        warmup_steps=config.learner.warmup_updates,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=config.learner.weight_decay,
        max_grad_norm=config.learner.grad_clip,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.run.seed,
    )
    prompts = task.train_prompts
    dataset = Dataset.from_dict(
        {"prompt": [p.text for p in prompts], "prompt_id": [p.prompt_id for p in prompts]}
    )

    def reward(completions: list[str], prompt_id: list[int], **_: Any) -> list[float | None]:
        pairs = zip(prompt_id, completions, strict=True)
        return [task.score(prompts[index], completion) for index, completion in pairs]

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    times = StepTimes()
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
        callbacks=[times],
    )
    return trainer, times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, overrides)
    task = make_task(config.task)
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make_trainer(
            config,
            task,
            micro_batch=arguments.micro_batch,
            num_steps=arguments.steps,
            folder=folder,
        )
        trainer.train()
    sys.stdout.write("\n" + json.dumps({"ends_s": times.ends_s}) + "\n")


if __name__ == "__main__":
    main()
