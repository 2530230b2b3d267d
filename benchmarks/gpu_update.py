"""The parts `update` and `sharded` of benchmarks/gpu_check.py: FLOPs and memory of the learner."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_setup import (
    Options,
    Row,
    dtype,
    indexed,
    matmul_flops_per_s,
    now_s,
    random_model,
    row,
)
from benchmarks.harness import MODEL_SHAPES
from benchmarks.learner_arm import random_completion
from speed_async.config.load import build_config
from speed_async.launcher.preflight.memory_budget import ModelSizes, Workload, learner_bytes
from speed_async.learner.model import load_model
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks, join_ranks, leave_ranks
from speed_async.learner.trainer import Trainer
from speed_async.types import Group
from speed_async.weight_sync.process_group import host_store

MFU_AIM, MEMORY_AIM = 0.50, 0.10
GROUP_SIZE = 4
JOIN_S = 60.0


def update(options: Options) -> list[Row]:
    return _measured("update", options, ONE_RANK)


def sharded(options: Options) -> list[Row]:
    """As with several learners, which gather each layer in bfloat16, with one that has all parts.
    The formula of `update` holds for it too."""
    store = host_store("127.0.0.1", JOIN_S)
    ranks = join_ranks(
        store,
        rank=0,
        size=1,
        device=indexed(options.device),
        ranks_per_node=1,
        timeout_s=JOIN_S,
    )
    try:
        return _measured("sharded update", options, ranks)
    finally:
        leave_ranks()


def _measured(what: str, options: Options, ranks: Ranks) -> list[Row]:
    """Two updates; the second one is measured. All rows have `row_tokens` tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = random_model(options, context=options.row_tokens, dtype=dtype(options.device))
        random.save_pretrained(folder)
        del random
        config = build_config(
            {
                "algorithm": "rloo",
                "run": {"folder": str(folder / "run")},
                "model": {"path": str(folder), "context_length": options.row_tokens},
                "task": {"name": "arithmetic"},
                "actors": {"max_new_tokens": options.row_tokens // 2},
                "learner": {"device": options.device, "warmup_updates": 0, "lr": 1e-6},
            }
        )
        model: Any = load_model(folder, device=options.device)
    trainer, groups = Trainer(config=config, model=model, ranks=ranks), equal_groups(options)
    trainer.update(groups[:1])
    rate = matmul_flops_per_s(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began_s = now_s(options.device)
    trainer.update(groups)
    update_s = now_s(options.device) - began_s
    num_tokens = options.rows * options.row_tokens
    rows = [
        row(what, "tokens/s", num_tokens / update_s),
        row(
            what,
            "MFU",
            update_flops(options.size, options.row_tokens) * num_tokens / update_s / rate,
            aim=f"{MFU_AIM:.2f}",
        ),
    ]
    if options.device == "cuda":
        formula = expected_bytes(options, config.learner.micro_batch_tokens)
        peak = torch.cuda.max_memory_allocated()
        rows += [
            row(what, "peak GiB", peak / 2**30),
            row(what, "peak over formula", peak / formula, aim=f"1 +- {MEMORY_AIM:.2f}"),
        ]
    return rows


def update_flops(size: str, row_tokens: int) -> float:
    """FLOPs per token of forward and backward pass: 6 for each weight that multiplies it (Kaplan et
    al., arXiv 2001.08361), and 12 x layers x width x length / 2 of causal attention (as in PaLM,
    arXiv 2204.02311, appendix B)."""
    sizes = model_sizes(size)
    is_tied = MODEL_SHAPES[size].get("tie_word_embeddings", False)
    lookup = 0 if is_tied else sizes.vocab_size * sizes.hidden_size
    attention = 6 * sizes.num_layers * sizes.num_heads * sizes.head_dim * row_tokens
    return 6.0 * (sizes.num_parameters - lookup) + attention


def expected_bytes(options: Options, micro_batch_tokens: int) -> int:
    """What torch allocates by the formula: without the process itself and the weight transfer."""
    workload = Workload(
        longest_row=options.row_tokens,
        micro_batch_tokens=micro_batch_tokens,
        num_kv_tokens=0,
        engine_value_bytes=2,
        bucket_bytes=0,
    )
    parts = learner_bytes(model_sizes(options.size), workload)
    return sum(size for name, size in parts.items() if name not in ("process", "weight transfer"))


def model_sizes(size: str) -> ModelSizes:
    shape = MODEL_SHAPES[size]
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    heads = shape["num_attention_heads"]
    return ModelSizes(
        num_parameters=model.num_parameters(),
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_heads=heads,
        num_kv_heads=shape.get("num_key_value_heads", heads),
        head_dim=shape["hidden_size"] // heads,
        vocab_size=shape["vocab_size"],
    )


def equal_groups(options: Options) -> list[Group]:
    """Groups of GROUP_SIZE completions; an eighth of each row is prompt."""
    random, vocabulary = np.random.default_rng(0), MODEL_SHAPES[options.size]["vocab_size"]
    num_prompt = options.row_tokens // 8
    num_tokens = options.row_tokens - num_prompt
    return [
        Group(
            prompt_id=index,
            prompt_token_ids=random.integers(1, vocabulary, num_prompt, dtype=np.int32),
            completions=tuple(
                random_completion(random, num_tokens, vocabulary, passed=i % 2 == 1)
                for i in range(GROUP_SIZE)
            ),
            lease_id=index,
            num_screening=0,
        )
        for index in range(max(1, options.rows // GROUP_SIZE))
    ]
