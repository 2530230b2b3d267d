"""The memory budget of a shared GPU: figures by hand, and sizes that torch allocates on a CPU."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speed_async.config.load import build_config
from speed_async.config.model_facts import read_model_info
from speed_async.config.schema import Config
from speed_async.config.sections.learner import ActivationCheckpointing, LearnerConfig
from speed_async.errors import ConfigError
from speed_async.launcher.preflight import shared_gpu
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.memory_budget import (
    GIB,
    ModelSizes,
    Workload,
    activation_bytes,
    layer_activation_bytes,
    learner_bytes,
    memory_budget,
)
from speed_async.launcher.preflight.shared_gpu import (
    check_shared_gpus,
    shared_gpu_budgets,
    with_shared_memory,
)
from speed_async.launcher.preflight.weights import Weights, read_weights
from speed_async.launcher.rank import Node, Rank
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import make_optimizer, named_state
from tests.fakes.live_bytes import LiveBytes
from tests.fakes.tiny_models import save_tiny_folder, sizes_of, tiny_model

SIZES = ModelSizes(
    num_parameters=1_500_000_000,
    num_layers=28,
    hidden_size=1536,
    intermediate_size=8960,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151_936,
)
WORKLOAD = Workload(
    longest_row=4096,
    micro_batch_tokens=8192,
    num_kv_tokens=4096,
    engine_value_bytes=2,
    bucket_bytes=64 << 20,
)


def test_parts_of_a_1_5b_model_computed_by_hand() -> None:
    budget = memory_budget(SIZES, WORKLOAD, has_learner=True, num_engines=1, total_bytes=80 * GIB)
    # One layer and token: 2 norms x 2 x 4 x 1,536; bfloat16: 5 x 1,536 + 3 x 1,536 queries and
    # result + 3 x 256 keys and values + 4 x 8,960.
    layer = 24_576 + 2 * (7_680 + 4_608 + 768 + 35_840)
    assert budget.learner == {
        "weights": 6_000_000_000,
        "gradients": 6_000_000_000,
        "optimizer": 12_000_000_000,
        "bfloat16 weights": 3_000_000_000,
        # Recomputed: all of one layer, and the input of 28 layers.
        "activations": 8192 * (layer + 28 * 4 * 1536),
        "logits": GIB,  # 2**26 at a time, 16 bytes each
        "weight transfer": 3 * 2 * 151_936 * 1536,  # the embedding: two buffers and a copy
        "process": GIB,
    }
    assert budget.engine == {
        "weights": 3_000_000_000,
        "KV cache": 4096 * 2 * 2 * 28 * 2 * 128,
        "kernels": GIB,
        "process": GIB,
    }
    assert budget.fits
    left = int(0.97 * 80 * GIB) - sum(budget.learner.values())
    assert budget.engine_bytes == left
    assert budget.kv_cache_bytes == left - 3_000_000_000 - 2 * GIB
    assert 0 <= left / (80 * GIB) - budget.engine_share < 0.001


def test_adapters_of_a_bfloat16_model_computed_by_hand() -> None:
    adapted = replace(WORKLOAD, lora_rank=16, frozen_value_bytes=2)
    parts = learner_bytes(SIZES, adapted)
    # Queries and output, keys and values, and gate, up and down of 28 layers.
    trained = 16 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert parts["weights"] == 2 * 1_500_000_000 + 4 * trained
    assert parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained
    assert parts["bfloat16 weights"] == 2 * trained  # autocast copies what is trained
    in_float32 = learner_bytes(SIZES, replace(WORKLOAD, lora_rank=16))
    assert in_float32["weights"] == 4 * (1_500_000_000 + trained)
    assert in_float32["bfloat16 weights"] == 2 * (1_500_000_000 // 28 + trained)


def test_what_a_learner_and_two_engines_need_must_be_there() -> None:
    two = {"has_learner": True, "num_engines": 2}
    needed = memory_budget(SIZES, WORKLOAD, total_bytes=0, **two).needed_bytes
    assert memory_budget(SIZES, WORKLOAD, total_bytes=needed, **two).fits
    assert not memory_budget(SIZES, WORKLOAD, total_bytes=needed - 1, **two).fits
    only_engines = memory_budget(
        SIZES, WORKLOAD, has_learner=False, num_engines=2, total_bytes=needed
    )
    assert only_engines.engine_bytes == int(0.97 * needed) // 2


def llama(num_layers: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def test_weights_gradients_and_moments_are_what_torch_allocates() -> None:
    model = llama(2)
    optimizer = make_optimizer(model, LearnerConfig())
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    parameters = [*model.parameters()]
    sizes = sizes_of(model.config, sum(each.numel() for each in parameters))
    expected = learner_bytes(sizes, WORKLOAD)
    assert expected["weights"] == sum(each.nbytes for each in parameters)
    assert expected["gradients"] == sum(each.grad.nbytes for each in parameters)
    state = named_state(optimizer, model)
    counters = sum(each.nbytes for name, each in state.items() if name.endswith(".step"))
    assert expected["optimizer"] == sum(each.nbytes for each in state.values()) - counters


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_of_a_layer_are_within_10_percent_of_what_torch_saves(autocast: bool) -> None:
    def saved_per_token(num_layers: int) -> float:
        model, storages = llama(num_layers), {}
        known = {each.untyped_storage().data_ptr() for each in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # alive: unique addresses
            return tensor

        num_tokens = 1024  # many, because bfloat16 copies of weights are saved as well
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model.base_model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long))
        return sum(num_bytes for num_bytes, _ in storages.values()) / num_tokens

    measured = (saved_per_token(3) - saved_per_token(1)) / 2
    sizes = sizes_of(llama(1).config, 1)
    assert layer_activation_bytes(sizes, autocast=autocast) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activations_kept_beside_recomputation_are_within_10_percent_of_what_torch_keeps(
    tmp_path: Path, kind: ActivationCheckpointing, autocast: bool
) -> None:
    num_tokens = 8192  # many, because autocast keeps bfloat16 copies of the weights as well

    def kept_per_token(num_layers: int) -> float:
        folder = tmp_path / str(num_layers)
        llama(num_layers).save_pretrained(folder)
        model = load_model(folder, device="cpu", activation_checkpointing=kind)
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = model.base_model(input_ids=torch.zeros(8, num_tokens // 8, dtype=torch.long))
            assert states.last_hidden_state.requires_grad
            return live.now() / num_tokens

    measured = (kept_per_token(4) - kept_per_token(2)) / 2
    sizes = [sizes_of(llama(layers).config, 1) for layers in (4, 2)]
    four, two = (
        activation_bytes(each, num_tokens, checkpointing=kind, autocast=autocast) for each in sizes
    )
    assert (four - two) / 2 / num_tokens == pytest.approx(measured, rel=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_folder(tmp_path / "model")


def weights_of(folder: Path) -> Weights:
    weights, _ = read_weights(folder)
    assert weights is not None
    return weights


def actor_of(num_ranks: int) -> Rank:
    """The last rank of a single node, an actor."""
    return Node(num_ranks=num_ranks).rank(num_ranks - 1)


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    tree = {"model": {"path": str(folder)}, "task": {"name": "arithmetic"}}
    actors = {"engine": "vllm", "max_new_tokens": 8} | sections.pop("actors", {})
    return build_config(tree | {"actors": actors} | sections)


@pytest.mark.parametrize(
    ("gpus", "num_ranks", "sections", "expected"),
    [
        (1, 2, {}, {0: (True, 1)}),
        (1, 3, {}, {0: (True, 2)}),
        (2, 2, {}, {0: (True, 0)}),
        (2, 4, {}, {0: (True, 1), 1: (False, 2)}),
        (4, 4, {"cluster": {"learners": 2}}, {0: (True, 0), 1: (True, 0)}),
        (3, 4, {"cluster": {"learners": 2}}, {0: (True, 1), 1: (True, 0)}),
        (1, 2, {"learner": {"device": "cpu"}}, {}),
        (1, 2, {"actors": {"engine": "torch", "device": "cpu"}}, {0: (True, 0)}),
        (1, 2, {"actors": {"engine": "torch"}}, {0: (True, 1)}),
        (0, 2, {}, {}),
    ],
)
def test_users_of_each_gpu_with_a_learner_or_several_engines(
    folder: Path,
    gpus: int,
    num_ranks: int,
    sections: dict[str, Any],
    expected: dict[int, tuple[bool, int]],
) -> None:
    budgets = shared_gpu_budgets(
        make_config(folder, **sections),
        read_model_info(folder),
        weights_of(folder),
        gpu_bytes=(80 * GIB,) * gpus,
        rank=Node(num_ranks=num_ranks).rank(0),
    )
    found = {gpu: (bool(each.learner), each.num_engines) for gpu, each in budgets.items()}
    assert found == expected


def test_vllm_gets_what_the_learner_leaves_unless_the_user_set_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (24 * GIB,))
    planned = with_shared_memory(make_config(folder), actor_of(2)).actors.vllm
    # The learner of a tiny model: its process, buckets of 2 x 64 MiB, logits, activations.
    assert planned.gpu_memory_utilization is not None
    assert 0.90 < planned.gpu_memory_utilization < 0.93
    assert planned.kv_cache_bytes is not None
    assert 19 * GIB < planned.kv_cache_bytes < 21 * GIB

    wanted = make_config(folder, actors={"vllm": {"gpu_memory_utilization": 0.4}})
    assert with_shared_memory(wanted, actor_of(2)) == wanted
    alone = make_config(folder, learner={"device": "cpu"})
    assert with_shared_memory(alone, actor_of(2)) == alone


def test_an_actor_with_gpus_of_its_own_is_not_limited_by_those_that_others_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (24 * GIB, 24 * GIB))
    config, node = make_config(folder), Node(num_ranks=3)
    on_its_own, beside_the_learner = (with_shared_memory(config, node.rank(i)) for i in (1, 2))
    assert on_its_own == config
    assert beside_the_learner.actors.vllm.gpu_memory_utilization is not None


def test_a_kv_cache_that_the_user_set_is_in_the_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (24 * GIB,))
    small, large = (
        make_config(folder, actors={"vllm": {"kv_cache_bytes": gib * GIB}}) for gib in (18, 20)
    )
    planned = with_shared_memory(small, actor_of(2)).actors.vllm
    assert planned.kv_cache_bytes == 18 * GIB
    # The learner has less than 2 GiB, and weights, kernels and process of the engine have 2.
    load = shared_gpu.workload(
        small, read_model_info(folder), weights_of(folder), num_local_ranks=2
    )
    budget = memory_budget(SIZES, load, has_learner=False, num_engines=1, total_bytes=0)
    assert budget.engine["KV cache"] == 18 * GIB
    findings = Findings()
    check_shared_gpus(
        large, read_model_info(folder), weights_of(folder), findings, rank=actor_of(3)
    )
    [error] = findings.errors
    assert isinstance(error, ConfigError)
    assert (error.field, error.value) == ("actors.vllm.kv_cache_bytes", 20 * GIB)
    assert "each engine weights" in str(error)
    assert "KV cache 20.0 GiB" in str(error)
    assert "set less, or remove it" in str(error)


def test_each_node_checks_its_own_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(folder, cluster={"learners": 3, "actors": 3})
    facts, weights = read_model_info(folder), weights_of(folder)
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (GIB, GIB))

    def refused(node: int) -> list[str]:
        findings = Findings()
        rank = Node(num_ranks=2, index=node, num_nodes=3).rank(0)
        lines = check_shared_gpus(config, facts, weights, findings, rank=rank)
        assert len(lines) == len(findings.errors)
        return [str(error).partition("a learner on ")[2][:5] for error in findings.errors]

    # Ranks 0 to 2 are learners, each with a GPU; the actors of other GPUs have them alone.
    assert refused(0) == ["GPU 0", "GPU 1"]
    assert refused(1) == ["GPU 0"]
    assert refused(2) == []


def test_a_gpu_that_is_too_small_is_refused_with_all_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (2 * GIB,))
    with pytest.raises(ConfigError) as raised:
        with_shared_memory(make_config(folder), actor_of(2))
    text = str(raised.value)
    assert "GPU 0 is shared by a learner and 1 actor, which need 3." in text
    for part in (
        "of 2.0 GiB: learner weights",
        "gradients",
        "optimizer",
        "activations",
        "KV cache",
    ):
        assert part in text
    assert "use more GPUs or a larger one" in text

    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (24 * GIB,))
    wanted = make_config(folder, actors={"vllm": {"gpu_memory_utilization": 0.95}})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization.* = 0\.95: .*set at most 0\.9"):
        with_shared_memory(wanted, actor_of(2))


def test_a_learner_that_does_not_fit_its_own_gpu_is_refused_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors() -> list[str]:
        findings = Findings()
        facts, weights = read_model_info(folder), weights_of(folder)
        check_shared_gpus(make_config(folder), facts, weights, findings, rank=actor_of(2))
        return [str(error) for error in findings.errors]

    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (GIB, 80 * GIB))
    [error] = errors()
    assert re.search(r"a learner on GPU 0 needs 1\.\d GiB of 1\.0 GiB", error)
    assert "cluster.learners" in error
    assert "learner.lora_rank" in error
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (8 * GIB, 80 * GIB))
    assert errors() == []


def test_several_learners_divide_the_parameters() -> None:
    one, four = (
        learner_bytes(SIZES, replace(WORKLOAD, learner_shards=n, has_reference=True))
        for n in (1, 4)
    )
    divided = ("weights", "gradients", "optimizer", "reference model")
    for part in divided:
        assert four[part] == one[part] // 4
    tables = 2 * 151_936 * 1536
    layer = (1_500_000_000 - tables) // 28
    assert four["gathered weights"] == 2 * (2 * layer + tables) + (2 + 4) * tables
    assert "bfloat16 weights" not in four
    offloaded = learner_bytes(SIZES, replace(WORKLOAD, learner_shards=4, cpu_offload=True))
    assert not set(divided) & set(offloaded)
    assert offloaded["gathered weights"] == four["gathered weights"]


def test_a_run_without_updates_needs_no_gradients_and_no_optimizer() -> None:
    parts = learner_bytes(SIZES, replace(WORKLOAD, trains=False))
    assert parts["weights"] == 6_000_000_000
    assert not {"gradients", "optimizer"} & set(parts)


@pytest.mark.parametrize(
    ("learners", "num_local_ranks", "shards"), [(1, 8, 1), (4, 8, 4), (16, 8, 8), (12, 8, 12)]
)
def test_learners_of_whole_nodes_divide_the_model_within_a_node(
    folder: Path, learners: int, num_local_ranks: int, shards: int
) -> None:
    config = make_config(folder, cluster={"learners": learners})
    load = shared_gpu.workload(
        config, read_model_info(folder), weights_of(folder), num_local_ranks=num_local_ranks
    )
    assert load.learner_shards == shards


def test_tensor_parallel_engines_divide_weights_and_kv_cache() -> None:
    whole = memory_budget(SIZES, WORKLOAD, has_learner=False, num_engines=1, total_bytes=GIB)
    half = memory_budget(
        SIZES,
        replace(WORKLOAD, engine_shards=2),
        has_learner=False,
        num_engines=1,
        total_bytes=GIB,
    )
    for part in ("weights", "KV cache"):
        assert half.engine[part] == whole.engine[part] // 2


def test_the_dtype_of_frozen_weights_is_that_of_their_files(folder: Path) -> None:
    """The learner reads it there; config.json may say something else."""

    def value_bytes(dtype: torch.dtype) -> tuple[int, int]:
        model = tiny_model("llama", tied=True).to(dtype)
        model.save_pretrained(folder)
        record = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(record))
        load = shared_gpu.workload(
            make_config(folder), read_model_info(folder), weights_of(folder), num_local_ranks=2
        )
        return load.frozen_value_bytes, load.gathered_value_bytes

    assert value_bytes(torch.float32) == (4, 4)
    assert value_bytes(torch.bfloat16) == (2, 2)
    assert value_bytes(torch.float16) == (4, 2)  # only bfloat16 weights stay as they are
