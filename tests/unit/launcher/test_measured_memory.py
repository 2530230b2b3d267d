"""The memory formulas of logits and KV caches against what torch allocates on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from speed_async.actors.torch_engine.cache_size import cache_layout
from speed_async.actors.torch_engine.slot_model import SlotModel
from speed_async.config.load import build_config
from speed_async.config.model_facts import read_model_info
from speed_async.launcher.preflight import memory
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.host_memory import HostMemory
from speed_async.launcher.preflight.memory import estimate_memory
from speed_async.launcher.preflight.memory_budget import ModelSizes, logits_bytes
from speed_async.launcher.preflight.model import CheckedModel
from speed_async.launcher.preflight.weights import read_weights
from speed_async.launcher.rank import Node
from speed_async.learner.policy import Policy
from tests.fakes.live_bytes import LiveBytes
from tests.fakes.tiny_models import CONTEXT_LENGTH, save_tiny_folder, tiny_model

HIDDEN, VOCABULARY, NUM_TOKENS = 4, 4096, 256


class Head(nn.Module):
    """A model of which `Policy` uses only the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_logits_are_within_2_percent_of_the_largest_sum_of_live_tensors(
    entropy_gradient: bool,
) -> None:
    model: Any = Head()
    policy = Policy(model, temperature=1.0, entropy_gradient=entropy_gradient)
    hidden_DH = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    targets_D = torch.zeros(NUM_TOKENS, dtype=torch.long)
    with LiveBytes() as live:
        policy._score_chunk(hidden_DH, targets_D, 1.0).sum().backward()
    sizes = ModelSizes(
        num_parameters=1,
        num_layers=1,
        hidden_size=HIDDEN,
        intermediate_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=VOCABULARY,
    )
    expected = logits_bytes(sizes, NUM_TOKENS, entropy_gradient=entropy_gradient)
    assert expected == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("num_slots", [4, 20, 64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kv_cache_is_what_a_full_torch_engine_holds(num_slots: int, attention: str) -> None:
    model = tiny_model("llama", tied=True, attention=attention)
    engine = SlotModel(model, num_slots)
    lengths = np.full(num_slots, CONTEXT_LENGTH)
    engine.reserve(CONTEXT_LENGTH)
    engine.append(lengths)
    tokens = np.zeros((num_slots, 3), np.int32)
    engine.prefill(np.arange(num_slots), tokens, np.full(num_slots, 3))
    held = sum(store.nbytes for store, _ in engine._cache._stores())
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    layout = cache_layout(num_slots, in_blocks=attention == "sdpa")
    assert held == 4 * per_token * layout.num_positions(CONTEXT_LENGTH)


def test_the_estimate_of_an_actor_includes_the_slots_of_all_regions(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "model")
    config = build_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "arithmetic"},
            "actors": {"slots": 20, "max_new_tokens": 8, "engine": "torch", "device": "cpu"},
        }
    )
    weights, _ = read_weights(folder)
    facts = read_model_info(folder)
    model = CheckedModel(facts=facts, weights=weights, context_length=CONTEXT_LENGTH)
    rank = Node(num_ranks=2).rank(0)
    text = "\n".join(estimate_memory(config, model, Findings(), rank=rank))
    # 2 blocks of 16 rows and 2 free regions, 96 tokens, 2 layers x 2 x 2 KV heads x 8, float32.
    num_kib = 4 * 16 * 96 * 2 * 2 * 2 * 8 * 4 / 1024
    assert f"at most {num_kib / 1024:.1f} MiB of KV cache (20 slots x 96 tokens)" in text


@pytest.mark.parametrize(("node", "whole_models"), [(0, 1), (1, 0), (2, 0)])
def test_what_learners_offload_must_fit_the_host_memory_of_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int, whole_models: int
) -> None:
    folder = save_tiny_folder(tmp_path / "model")
    config = build_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "arithmetic"},
            "actors": {"engine": "torch"},
            "cluster": {"learners": 3, "actors": 3},
            "learner": {"cpu_offload": True},
        }
    )
    weights, _ = read_weights(folder)
    assert weights is not None
    # Three learners have 2, 1 and 0 of three parts on three nodes of two ranks.
    needed = 16 * weights.num_parameters * (2, 1, 0)[node] // 3
    needed += 4 * weights.num_parameters * whole_models

    def warnings(available: int) -> list[str]:
        free = HostMemory(total_bytes=1 << 40, available_bytes=available, limit_bytes=None)
        monkeypatch.setattr(memory, "host_memory", lambda: free)
        monkeypatch.setattr(memory, "why_no_gpu", lambda: "")
        findings = Findings()
        model = CheckedModel(
            facts=read_model_info(folder), weights=weights, context_length=CONTEXT_LENGTH
        )
        rank = Node(num_ranks=2, index=node, num_nodes=3).rank(0)
        estimate_memory(config, model, findings, rank=rank)
        return findings.warnings

    assert warnings(needed) == []
    if needed:
        [warning] = warnings(needed - 1)
        assert "what learners keep in host memory" in warning
        assert "learner.cpu_offload" in warning
