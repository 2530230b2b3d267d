"""One arm of benchmarks/learner.py: a few updates on random groups, one JSON line of results.

`ours` is `Trainer.update`. `hugging-face` is the loop that one writes first: right-padded
micro-batches in the order of the data, `model(...).logits` at all positions, backward, clipping,
AdamW. Both have the same groups, the same loss (RLOO advantages, policy gradient, mean over tokens)
and float32 parameters, so the gradient norms of the measured update agree.

Shape legend: B sequences, L positions, V vocabulary.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import MODEL_SHAPES
from speed_async.config.load import build_config
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import make_optimizer
from speed_async.learner.trainer import Trainer
from speed_async.types import Completion, Group, Sampled

PROMPT_TOKENS = (64, 257)
MEDIAN_TOKENS, SPREAD, MIN_TOKENS, MAX_TOKENS = 256, 0.9, 64, 2048
"""Lengths of completions: log-normal, clipped."""
CONTEXT = PROMPT_TOKENS[1] + MAX_TOKENS


def save_random_llama(size: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**MODEL_SHAPES[size], max_position_embeddings=CONTEXT, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)


def random_completion(
    random: np.random.Generator, length: int, vocabulary: int, *, passed: bool
) -> Completion:
    return Completion(
        sampled=Sampled(
            token_ids=random.integers(1, vocabulary, length, dtype=np.int32),
            logprobs=np.full(length, -np.log(vocabulary), np.float32),
            policy_versions=np.zeros(length, np.int32),
            finish_reason="stop",
        ),
        reward=float(passed),
        passed=passed,
    )


def random_groups(num_groups: int, group_size: int, vocabulary: int, seed: int) -> list[Group]:
    random = np.random.default_rng(seed)

    def completion(index: int) -> Completion:
        length = int(
            np.clip(random.lognormal(np.log(MEDIAN_TOKENS), SPREAD), MIN_TOKENS, MAX_TOKENS)
        )
        return random_completion(random, length, vocabulary, passed=index % 2 == 1)

    return [
        Group(
            prompt_id=index,
            prompt_token_ids=random.integers(
                1, vocabulary, random.integers(*PROMPT_TOKENS), dtype=np.int32
            ),
            completions=tuple(completion(i) for i in range(group_size)),
            lease_id=index,
            num_screening=0,
        )
        for index in range(num_groups)
    ]


def make_config(folder: Path, micro_batch_tokens: int = 0) -> Any:
    learner: dict[str, object] = {"device": "cpu", "warmup_updates": 0, "lr": 1e-6}
    if micro_batch_tokens:
        learner["micro_batch_tokens"] = micro_batch_tokens
    return build_config(
        {
            "algorithm": "rloo",
            "run": {"folder": str(folder / "run")},
            "model": {"path": str(folder), "context_length": CONTEXT},
            "task": {"name": "arithmetic"},
            "actors": {"max_new_tokens": MAX_TOKENS},
            "objective": {"policy_loss": "policy_gradient"},
            "learner": learner,
        }
    )


def ours(folder: Path, micro_batch: int) -> Callable[[Sequence[Group]], float]:
    """`micro_batch` in tokens; 0 is the default."""
    config = make_config(folder, micro_batch)
    trainer = Trainer(config=config, model=load_model(folder, device="cpu"))
    return lambda groups: trainer.update(groups).metrics["grad_norm"]


def hugging_face(folder: Path, micro_batch: int) -> Callable[[Sequence[Group]], float]:
    """`micro_batch` in completions."""
    config = make_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = make_optimizer(model, config.learner)

    def update(groups: Sequence[Group]) -> float:
        rewards = [[c.reward for c in group.completions] for group in groups]
        rows = [
            (group.prompt_token_ids, c.sampled.token_ids, r - (sum(rs) - r) / (len(rs) - 1))
            for group, rs in zip(groups, rewards, strict=True)
            for c, r in zip(group.completions, rs, strict=True)
        ]
        num_tokens = sum(len(tokens) for _, tokens, _ in rows)
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rows), micro_batch):
            (_loss(model, rows[start : start + micro_batch]) / num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.learner.grad_clip)
        optimizer.step()
        return norm.item()

    return update


def _loss(model: Any, rows: Sequence[tuple[Any, Any, float]]) -> Tensor:
    """Sum over the completion tokens."""
    longest = max(len(prompt) + len(tokens) for prompt, tokens, _ in rows)
    input_ids_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    attended_BL = torch.zeros_like(input_ids_BL)
    weights_BL = torch.zeros(len(rows), longest - 1)
    for index, (prompt, tokens, advantage) in enumerate(rows):
        end = len(prompt) + len(tokens)
        input_ids_BL[index, :end] = torch.from_numpy(np.concatenate([prompt, tokens]))
        attended_BL[index, :end] = 1
        weights_BL[index, len(prompt) - 1 : end - 1] = advantage
    logits_BLV = model(input_ids=input_ids_BL, attention_mask=attended_BL).logits[:, :-1]
    logprobs_BLV = logits_BLV.float().log_softmax(-1)
    logprobs_BL = logprobs_BLV.gather(-1, input_ids_BL[:, 1:, None])[..., 0]
    return -(weights_BL * logprobs_BL).sum()


ARMS = {"ours": ours, "hugging-face": hugging_face}


class Meter:
    """Time and memory between `begin` and `end`."""

    def begin(self) -> None:
        self._before_mib = memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._used = resource.getrusage(resource.RUSAGE_SELF)
        self._started_s = time.perf_counter()

    def end(self) -> None:
        wall_s, used = (
            time.perf_counter() - self._started_s,
            resource.getrusage(resource.RUSAGE_SELF),
        )
        cpu_s = used.ru_utime + used.ru_stime - self._used.ru_utime - self._used.ru_stime
        peak_mib = memory_mib("VmHWM")
        self.results = {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "peak_mib": peak_mib,
            "update_mib": peak_mib - self._before_mib,
        }


def memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=[*ARMS, "trl"], required=True)
    parser.add_argument("--size", choices=MODEL_SHAPES, required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocabulary = MODEL_SHAPES[options.size]["vocab_size"]
    groups = random_groups(options.groups, options.group_size, vocabulary, seed=0)
    meter, norm = Meter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_llama(options.size, folder)
        if options.arm == "trl":
            from benchmarks.learner_trl import train

            train(folder, groups, options.micro_batch, begin=meter.begin, end=meter.end)
        else:
            update = ARMS[options.arm](folder, options.micro_batch)
            update(random_groups(1, 2, vocabulary, seed=1))  # allocates the optimiser state
            meter.begin()
            norm = update(groups)
            meter.end()
    tokens = sum(group.num_tokens for group in groups)
    sys.stdout.write(
        "\n" + json.dumps({"grad_norm": norm, "tokens": tokens, **meter.results}) + "\n"
    )


if __name__ == "__main__":
    main()
