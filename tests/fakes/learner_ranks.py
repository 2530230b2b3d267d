"""Learner ranks as processes, which train the same tiny models on the same groups.

`RANK SIZE PORT FOLDER SCENARIO...`: runs the scenarios as one of SIZE ranks and writes what it
found to FOLDER/SIZE-RANK-SCENARIO. NAME/resumed continues NAME, NAME/twice is both without a break.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import speed_async.learner.placement as placement_module
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.learner.checkpoint.captured import MASTER, OPTIMIZER
from speed_async.learner.checkpoint.shards import (
    SavedRows,
    load_state,
    load_weights,
    saved_paths,
)
from speed_async.learner.checkpoint.store import checkpoint_folder
from speed_async.learner.model import load_model
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks, join_ranks, leave_ranks
from speed_async.learner.parallel.sharding import load_for_rank
from speed_async.learner.progress import Progress
from speed_async.learner.trainer import Trainer
from speed_async.types import Group
from tests.fakes.learner_samples import (
    VOCABULARY,
    make_completion,
    make_config,
    make_group,
    random_groups,
    save_tiny_llama,
)
from tests.fakes.paths import REPOSITORY

NUM_UPDATES = 5
TIMEOUT_S = 600.0
CPU = torch.device("cpu")
SCENARIOS: dict[str, dict[str, Any]] = {
    "dense": {"micro_batch_tokens": 48},
    "experts": {"micro_batch_tokens": 48},
    "scored": {
        "micro_batch_tokens": 48,
        "passes": 2,
        "minibatches": 2,
        "objective": ObjectiveConfig(
            correction="token_tis", kl="k1", kl_coefficient=0.01, entropy_coefficient=0.01
        ),
    },
    "adapters": {
        "micro_batch_tokens": 48,
        "lora_rank": 3,
        "lora_alpha": 6.0,
        "objective": ObjectiveConfig(kl="k3", kl_coefficient=0.1),
    },
    "normalized": {"objective": ObjectiveConfig(correction="sequence_snis")},
    "overflow": {"micro_batch_tokens": 48},
}
OVERFLOWING_UPDATE = 2
HALF = "half"
"""As `adapters`, with frozen weights in bfloat16, as on GPUs."""


def save_models(folder: Path) -> None:
    dense = load_model(save_tiny_llama(folder / "dense"), device="cpu")
    dense.bfloat16().save_pretrained(folder / HALF)
    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=5,  # not divisible by the number of ranks
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    Qwen3MoeForCausalLM(settings).save_pretrained(folder / "experts")


def batch(scenario: str, update: int) -> list[Group]:
    if scenario == "normalized" and update == 1:  # no rank has a row with a gradient
        completion = make_completion([1, 2], 1.0)
        return [make_group([1], completion, completion)]
    groups = random_groups(update, num_groups=1 if scenario == "normalized" else 5)
    if scenario == "overflow" and update == OVERFLOWING_UPDATE:
        ends = (make_completion([1, 2], -3e38), make_completion([3], 3e38))
        groups.append(make_group([1, 2], *ends, lease_id=9))
    return groups


def run_scenario(
    folder: Path,
    name: str,
    ranks: Ranks,
    *,
    resumes: bool = False,
    saves: bool = False,
    rounds: int = 1,
) -> tuple[list[Any], dict[str, Tensor]]:
    """The results of all updates, and the final parameters. A round is NUM_UPDATES of them.
    `resumes`: of the round after that of an earlier call with this folder and `saves`, which writes
    a checkpoint with one rank, and with several, if its folder exists, what each adds to it."""
    model_folder = folder / (name if name in ("experts", HALF) else "dense")
    scenario = SCENARIOS["adapters" if name == HALF else name]
    kind = "full" if name == "scored" else "selective" if name == "adapters" else "none"
    with patch.object(placement_module, "keeps_bfloat16", return_value=name == HALF):
        trainer = Trainer(
            config=make_config(model_folder, **({"lr": 1e-3, "warmup_updates": 0} | scenario)),
            model=load_for_rank(model_folder, ranks, device="cpu", activation_checkpointing=kind),
            ranks=ranks,
        )
    results, rows = [], folder / f"rows-{name}"
    checkpoint = checkpoint_folder(model_folder / "run" / "checkpoints", NUM_UPDATES)
    if resumes and checkpoint.is_dir():
        trainer.restore(checkpoint)
    elif resumes:
        trainer.num_updates = NUM_UPDATES
        load_weights(trainer.model, SavedRows(saved_paths(rows, MASTER)))
        load_state(trainer._optimizer, trainer.model, SavedRows(saved_paths(rows, OPTIMIZER)))
    for update in [*range(NUM_UPDATES)] * rounds:
        result = asdict(trainer.update(batch(name, update)))
        results.append(result | {"canary": trainer.canary().logprobs})
    if saves and ranks.size == 1:
        trainer.save(Progress(policy_version=NUM_UPDATES))
    elif saves and rows.is_dir():
        trainer.write_training(rows, trainer.capture_training(copy=False))
    names = [name for name, _ in trainer.weights()]
    return results, {each: trainer.whole([each])[each].clone() for each in names}


def run_ranks(folder: Path, size: int, scenarios: Sequence[str]) -> None:
    """All ranks as processes. Raises CalledProcessError when one fails."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "tests.fakes.learner_ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(store.port), str(folder), *scenarios],
            cwd=REPOSITORY,
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            if process.wait(TIMEOUT_S):
                raise subprocess.CalledProcessError(process.returncode, process.args)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def found(folder: Path, size: int, rank: int, name: str) -> tuple[Any, Mapping[str, Tensor]]:
    """What `run_scenario` returned in this rank."""
    stem = _stem(folder, size, rank, name)
    return json.loads(stem.with_suffix(".json").read_text()), load_file(f"{stem}.safetensors")


def _stem(folder: Path, size: int, rank: int, scenario: str) -> Path:
    return folder / f"{size}-{rank}-{scenario.replace('/', '-')}"


def main(rank: int, size: int, port: int, folder: Path, scenarios: Sequence[str]) -> None:
    torch.set_num_threads(1)
    ranks = ONE_RANK
    if size > 1:
        store = TCPStore("127.0.0.1", port, is_master=False)
        ranks = join_ranks(
            store, rank=rank, size=size, device=CPU, ranks_per_node=2, timeout_s=TIMEOUT_S
        )
    for each in scenarios:
        name, _, kind = each.partition("/")
        results, weights = run_scenario(
            folder,
            name,
            ranks,
            resumes=kind == "resumed",
            saves=not kind,
            rounds=2 if kind == "twice" else 1,
        )
        stem = _stem(folder, size, rank, each)
        stem.with_suffix(".json").write_text(json.dumps(results))
        save_file(weights, f"{stem}.safetensors")
    leave_ranks()


if __name__ == "__main__":
    rank, size, port = map(int, sys.argv[1:4])
    main(rank, size, port, Path(sys.argv[4]), sys.argv[5:])
