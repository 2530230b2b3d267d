"""Peak memory of an update by the length of a row and the size of the vocabulary.

Each measurement is a process of its own with a small random model and one group of two completions
of equal length. The increase from the shorter to the longer row, per token of the row, should not
depend on the vocabulary: logits are computed in chunks of `MAX_LOGITS`.

Usage: python -m benchmarks.learner_memory
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import output_of, report
from benchmarks.learner_arm import Meter, random_completion
from speed_async.config.load import build_config
from speed_async.learner.model import load_model
from speed_async.learner.trainer import Trainer
from speed_async.types import Group

VOCABULARIES = (32_768, 151_936)
ROW_TOKENS = (4_096, 16_384)
PROMPT_TOKENS = 64
THREADS = 2


def measure(vocabulary: int, row_tokens: int) -> dict[str, float]:
    """In this process: memory in MiB that an update adds at its peak, and its time."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    random = np.random.default_rng(0)

    def group(length: int) -> Group:
        ends = (random_completion(random, length, vocabulary, passed=end) for end in (False, True))
        prompt = random.integers(1, vocabulary, PROMPT_TOKENS, dtype=np.int32)
        return Group(
            prompt_id=0,
            prompt_token_ids=prompt,
            completions=tuple(ends),
            lease_id=0,
            num_screening=0,
        )

    with tempfile.TemporaryDirectory() as name:
        settings = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocabulary,
            max_position_embeddings=max(ROW_TOKENS),
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(settings).save_pretrained(name)
        completion_tokens = row_tokens - PROMPT_TOKENS
        config = build_config(
            {
                "algorithm": "rloo",
                "run": {"folder": str(Path(name) / "run")},
                "model": {"path": name},
                "task": {"name": "arithmetic"},
                "actors": {"max_new_tokens": completion_tokens},
                "learner": {"device": "cpu", "micro_batch_tokens": row_tokens},
            }
        )
        trainer = Trainer(config=config, model=load_model(name, device="cpu"))
        trainer.update([group(8)])  # allocates the state of the optimizer
        meter = Meter()
        meter.begin()
        trainer.update([group(completion_tokens)])
        meter.end()
    return meter.results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", type=int, nargs=2, help="vocabulary and row: one measurement")
    options = parser.parse_args()
    if options.one is not None:
        sys.stdout.write("\n" + json.dumps(measure(*options.one)) + "\n")
        return
    rows = []
    for vocabulary in VOCABULARIES:
        runs = []
        for row_tokens in ROW_TOKENS:
            own = ["--one", str(vocabulary), str(row_tokens)]
            command = [sys.executable, "-m", "benchmarks.learner_memory", *own]
            runs.append(json.loads(output_of(command, os.environ).splitlines()[-1]))
        increase_mib = runs[1]["update_mib"] - runs[0]["update_mib"]
        rows.append(
            {
                "vocabulary": vocabulary,
                **{f"mib_{n}": r["update_mib"] for n, r in zip(ROW_TOKENS, runs, strict=True)},
                "kib_per_token": 1024 * increase_mib / (ROW_TOKENS[1] - ROW_TOKENS[0]),
                "wall_s": runs[1]["wall_s"],
            }
        )
    report("learner_memory", "Memory of one update by the vocabulary", rows)


if __name__ == "__main__":
    main()
