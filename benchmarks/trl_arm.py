# pyright: reportMissingImports=false
"""TRL's RLOOTrainer on a task of this project: one process, one JSON line of results at the end.

Started by benchmarks/trl.py (speed) and benchmarks/evidence (learning). The settings are the
fastest ones for TRL here.
"""

import argparse
import json
import math
import sys
import tempfile
import time
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

from speed_async.config.load import load_config
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.task import Task
from speed_async.learner.checkpoint.store import checkpoint_folder

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Float32 on a CPU, without anything but training."""


class Checkpoints(TrainerCallback):
    """Cost at the end of each optimizer step, and a checkpoint of the model every few steps.

    The time and CPU time of saving are excluded. Training ends after `max_tokens`.
    """

    def __init__(self, folder: Path | None, every: int, max_tokens: float) -> None:
        self._folder = folder
        self._every = every
        self._max_tokens = max_tokens
        self.ends_s: list[float] = []
        self.core_s: list[float] = []
        self.tokens: list[int] = []
        self.num_tokens = 0
        """Completion tokens generated so far, counted by the reward function."""
        self.start_s = self.start_core_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start_s, self.start_core_s = time.perf_counter(), time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now_s, core_s = time.perf_counter(), time.process_time()
        self.ends_s.append(now_s - self.start_s)
        self.core_s.append(core_s - self.start_core_s)
        self.tokens.append(self.num_tokens)
        if self._folder is not None and state.global_step % self._every == 0:
            kwargs["model"].save_pretrained(checkpoint_folder(self._folder, state.global_step))
            self.start_s += time.perf_counter() - now_s
            self.start_core_s += time.process_time() - core_s
        if self.num_tokens >= self._max_tokens:
            control.should_training_stop = True


def make_trainer(
    config: Config,
    task: Task,
    *,
    micro_batch: int,
    num_steps: int,
    folder: str,
    checkpoints: Checkpoints,
) -> RLOOTrainer:
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
        top_k=0,
        beta=0.0,
        learning_rate=config.learner.lr,
        warmup_steps=config.learner.warmup_updates,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=config.learner.weight_decay,
        max_grad_norm=config.learner.grad_clip,
        **ON_CPU,
        seed=config.run.seed,
    )
    prompts = task.train_prompts
    dataset = Dataset.from_dict(
        {"prompt": [p.text for p in prompts], "prompt_id": [p.prompt_id for p in prompts]}
    )

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)

    def reward(
        completions: list[str],
        prompt_id: list[int],
        completion_ids: list[list[int]],
        **_: Any,
    ) -> list[float | None]:
        """A truncated completion does not pass, as in `task.score_truncated = false`."""
        checkpoints.num_tokens += sum(map(len, completion_ids))
        rows = zip(prompt_id, completions, completion_ids, strict=True)
        return [
            task.score(prompts[index], completion) if ids[-1] == tokenizer.eos_token_id else 0.0
            for index, completion, ids in rows
        ]

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    return RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[checkpoints],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, help="all completions of an update without it")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-tokens", type=float, default=math.inf)
    parser.add_argument("--checkpoints", type=Path, help="folder; none are written without it")
    parser.add_argument("--checkpoint-every", type=int, default=1)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, overrides)
    checkpoints = Checkpoints(
        arguments.checkpoints, arguments.checkpoint_every, arguments.max_tokens
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            config,
            make_task(config.task),
            micro_batch=arguments.micro_batch
            or config.gate.group_size * config.learner.groups_per_update,
            num_steps=arguments.steps,
            folder=folder,
            checkpoints=checkpoints,
        )
        trainer.train()
    results = {
        "ends_s": checkpoints.ends_s,
        "core_s": checkpoints.core_s,
        "tokens": checkpoints.tokens,
    }
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
