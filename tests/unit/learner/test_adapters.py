"""Low-rank adapters: what is trained, what others see, and how a run continues."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import speed_async.learner.placement as placement_module
from speed_async.config.load import build_config
from speed_async.config.sections.learner import LearnerConfig
from speed_async.config.sections.objective import ObjectiveConfig
from speed_async.errors import ModelError
from speed_async.launcher.preflight.memory_budget import adapter_parameters
from speed_async.learner.adapters import (
    AdaptedLinear,
    add_adapters,
    is_factor,
    keeps_bfloat16,
    restore_bfloat16,
    without_adapters,
)
from speed_async.learner.checkpoint.dtypes import read_dtypes, tensor_bytes
from speed_async.learner.checkpoint.export import export
from speed_async.learner.checkpoint.export_adapter import export_adapter
from speed_async.learner.checkpoint.store import checkpoint_folder
from speed_async.learner.model import load_model
from speed_async.learner.trainer import Trainer
from tests.fakes.learner_samples import make_config, random_groups, save_tiny_llama
from tests.fakes.tiny_models import sizes_of
from tests.fakes.trainers import at, make_trainer

LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 6.0, "warmup_updates": 0}
IDS = torch.arange(1, 9)[None]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def trained(folder: Path, *, num_updates: int = 2, **changes: Any) -> Trainer:
    trainer = make_trainer(folder, **(LORA | changes))
    for seed in range(num_updates):
        trainer.update(random_groups(seed))
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    names = [name for name, _ in trainer.weights()]
    return {name: trainer.whole([name])[name].clone() for name in names}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def newest(folder: Path) -> Path:
    return checkpoint_folder(folder / "run" / "checkpoints", 2)


def test_training_begins_at_the_given_model_and_changes_only_the_adapters(
    model_folder: Path,
) -> None:
    start = logits(load_model(model_folder, device="cpu"))
    trainer = make_trainer(model_folder, **LORA)
    torch.testing.assert_close(logits(trainer.model), start, rtol=0, atol=0)
    before = {name: each.clone() for name, each in trainer.model.named_parameters()}
    trainer.update(random_groups(0))
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= set(filter(is_factor, after))
    layers = [each for each in trainer.model.modules() if isinstance(each, AdaptedLinear)]
    assert len(layers) == 2 * 7  # queries, keys, values, output, gate, up and down
    assert sum("lora_B" in name for name in changed) == len(layers)


def test_actors_get_the_weights_with_the_adapters(model_folder: Path) -> None:
    trainer = trained(model_folder)
    weights = weights_of(trainer)
    layer = trainer.model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, AdaptedLinear)
    expected = layer.weight + 6.0 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(weights["model.layers.1.mlp.up_proj.weight"], expected)
    engine = load_model(model_folder, device="cpu")
    assert set(weights) == {name for name, _ in engine.named_parameters()}
    engine.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(engine), logits(trainer.model), atol=1e-5, rtol=0)
    trainer.canary()


def test_the_update_is_that_of_the_factors_of_the_chain_rule(model_folder: Path) -> None:
    """The gradient of B is s dW A^T: with A fixed, one step of plain W would move along it."""
    trainer, full = make_trainer(model_folder, **LORA), load_model(model_folder, device="cpu")
    layer = trainer.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, AdaptedLinear)
    for model in (trainer.model, full):
        model(input_ids=IDS).logits.square().sum().backward()
    grad_OI = full.get_submodule("model.layers.0.self_attn.q_proj").weight.grad
    assert isinstance(grad_OI, torch.Tensor)
    assert layer.lora_B.grad is not None
    torch.testing.assert_close(layer.lora_B.grad, 2.0 * grad_OI @ layer.lora_A.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_a_merged_model_and_resumes_bitwise(
    model_folder: Path, dtype: torch.dtype
) -> None:
    model = load_model(model_folder, device="cpu").to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.save_pretrained(model_folder)
    trainer = trained(model_folder)
    trainer.save(at(2))
    merged = AutoModelForCausalLM.from_pretrained(newest(model_folder), dtype="auto")
    expected = {name: each.to(dtype) for name, each in weights_of(trainer).items()}
    assert {name: each.dtype for name, each in merged.named_parameters()} == dict.fromkeys(
        expected, dtype
    )
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=0)

    resumed = make_trainer(model_folder, **LORA)
    resumed.restore(newest(model_folder))
    for each in (trainer, resumed):
        each.update(random_groups(7))
    one, other = weights_of(trainer), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_other_parameters_is_refused(model_folder: Path) -> None:
    trained(model_folder).save(at(2))
    for changes in ({"lora_rank": 0}, {"lora_rank": 4}):
        with pytest.raises(ModelError, match="cannot be restored"):
            make_trainer(model_folder, **(LORA | changes)).restore(newest(model_folder))
    shutil.rmtree(newest(model_folder))
    trained(model_folder, lora_rank=0).save(at(2))
    with pytest.raises(ModelError, match="other adapters than this run, or none"):
        make_trainer(model_folder, **LORA).restore(newest(model_folder))


def test_a_copy_for_a_later_write_does_not_change_with_training(model_folder: Path) -> None:
    trainer = trained(model_folder)
    captured, before = trainer.capture(), weights_of(trainer)
    trainer.update(random_groups(5))
    trainer.write(at(2), captured)
    merged = load_model(newest(model_folder), device="cpu")
    assert all(torch.equal(before[name], each) for name, each in merged.named_parameters())


def test_the_reference_is_the_model_without_adapters_and_takes_no_memory(
    model_folder: Path,
) -> None:
    objective = ObjectiveConfig(kl_coefficient=0.1)

    def trainer_of(learner: dict[str, Any]) -> Trainer:
        config = make_config(model_folder, objective=objective, lr=0.01, **learner)
        return Trainer(config=config, model=load_model(model_folder, device="cpu"))

    trainers = [trainer_of(LORA), trainer_of({"warmup_updates": 0})]
    adapted, whole = (
        [trainer.update(random_groups(seed)).metrics for seed in (1, 2)] for trainer in trainers
    )
    with without_adapters(trainers[0].model):
        start = logits(trainers[0].model)
    assert adapted[0]["reference_kl_k3"] == pytest.approx(whole[0]["reference_kl_k3"], abs=1e-9)
    assert adapted[1]["reference_kl_k3"] > 0
    torch.testing.assert_close(start, logits(load_model(model_folder, device="cpu")))


@pytest.mark.parametrize(
    ("device", "actors", "expected"),
    [
        ("cuda", {"device": "auto"}, True),
        ("cuda", {"device": "cpu"}, False),
        ("cuda", {"engine": "vllm"}, True),
        ("cuda", {"engine": "vllm", "vllm": {"arguments": {"dtype": "float32"}}}, False),
        ("cpu", {"device": "auto"}, False),
    ],
)
def test_frozen_weights_stay_in_bfloat16_on_a_gpu_unless_engines_compute_in_float32(
    model_folder: Path, device: str, actors: dict[str, Any], expected: bool
) -> None:
    tree = {"task": {"name": "arithmetic"}, "model": {"path": str(model_folder)}}
    config = build_config(tree | {"actors": {"max_new_tokens": 8} | actors})
    assert keeps_bfloat16(config, torch.device(device)) is expected


def test_with_bfloat16_frozen_weights_training_and_the_merged_weights_are_those_of_float32(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_folder, device="cpu")
    kept = "model.norm.weight"  # in float32 in the folder too
    dtypes = {name: torch.bfloat16 for name, _ in model.named_parameters() if name != kept}
    assert restore_bfloat16(
        model.requires_grad_(False), lambda name: dtypes.get(name, torch.float32)
    )
    model.save_pretrained(model_folder)
    full = trained(model_folder, num_updates=3)
    monkeypatch.setattr(placement_module, "keeps_bfloat16", lambda config, device: True)
    half = trained(model_folder, num_updates=3)
    for name, each in half.model.named_parameters():
        assert each.dtype == (torch.bfloat16 if name in dtypes else torch.float32), name
    half.canary()

    start = dict(load_model(model_folder, device="cpu").named_parameters())
    expected, found = weights_of(full), weights_of(half)
    changed = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert len(changed) == 2 * 7
    for name in changed:
        assert found[name].dtype == torch.float32  # rounded once, by the sender
        one, other = (each[name] - start[name] for each in (expected, found))
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9, name
    half.save(at(3))
    merged = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(model_folder / "run" / "checkpoints", 3), dtype="auto"
    )
    for name, value in merged.named_parameters():
        if name != kept:  # transformers loads all in one dtype
            torch.testing.assert_close(value.detach(), found[name].bfloat16(), rtol=0, atol=0)


def test_memory_and_disk_are_what_the_formulas_say(model_folder: Path) -> None:
    trainer = trained(model_folder)
    parameters = dict(trainer.model.named_parameters())
    num_adapted = sum(each.numel() for name, each in parameters.items() if is_factor(name))
    num_whole = sum(each.numel() for each in parameters.values()) - num_adapted
    sizes = sizes_of(trainer.model.config, num_whole)  # pyright: ignore[reportArgumentType]
    assert adapter_parameters(sizes, LORA["lora_rank"]) == num_adapted
    trainer.save(at(2))
    files = sum(path.stat().st_size for path in newest(model_folder).rglob("*.safetensors"))
    training = newest(model_folder) / "training"
    tensors = sum(path.stat().st_size for path in training.iterdir() if path.suffix != ".json")
    predicted = tensor_bytes(trainer.model, read_dtypes(model_folder))
    assert predicted == 4 * num_whole + 12 * num_adapted
    assert predicted <= files + tensors < predicted + 30_000  # headers


def test_a_router_that_inherits_from_a_linear_layer_has_no_adapter(model_folder: Path) -> None:
    class Router(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(input), input

    model = load_model(model_folder, device="cpu")
    model.base_model.router = Router(16, 2)
    add_adapters(model, LearnerConfig(**LORA), seed=0)
    assert type(model.base_model.router) is Router


def test_exported_adapters_are_those_of_peft(model_folder: Path, tmp_path: Path) -> None:
    trainer, out = trained(model_folder), tmp_path / "adapter"
    trainer.save(at(2))
    export_adapter(newest(model_folder), out, make_config(model_folder, **LORA))
    record = json.loads((out / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"]) == (3, 6.0)
    assert record["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    factors = load_file(out / "adapter_model.safetensors")
    start = dict(load_model(model_folder, device="cpu").named_parameters())
    for name, merged in weights_of(trainer).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in factors:
            product = factors.pop(key.format("B")) @ factors.pop(key.format("A"))
            torch.testing.assert_close(merged, start[name].detach() + 2.0 * product)
        else:
            assert torch.equal(merged, start[name])
    assert factors == {}
    without = make_config(model_folder)
    with pytest.raises(ModelError, match=r"has no adapters: learner\.lora_rank was 0"):
        export_adapter(newest(model_folder), tmp_path / "other", without)


def test_an_export_has_the_merged_weights_in_another_dtype(
    model_folder: Path, tmp_path: Path
) -> None:
    trainer = trained(model_folder)
    trainer.save(at(2))
    export(newest(model_folder), tmp_path / "out", torch.float16)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = weights_of(trainer)
    for name, value in exported.named_parameters():
        assert torch.equal(value, expected[name].half())
