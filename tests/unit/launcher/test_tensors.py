"""Whether the weight files of a model folder have the tensors that its config.json describes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speed_async.config.load import build_config
from speed_async.errors import ConfigError, ModelError
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.model import check_model
from speed_async.launcher.preflight.tensors import (
    FAMILIES,
    PREFIX,
    expected_shapes,
    tensor_faults,
)
from speed_async.launcher.preflight.weights import read_weights
from speed_async.learner.model import load_model
from tests.fakes.tiny_models import VOCABULARY, save_tiny_folder

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"head_dim": 12, "attention_bias": True, "mlp_bias": True}]
)
def test_the_tensors_of_a_family_are_those_of_its_class_in_transformers(
    family: str, tied: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    if family == "qwen3":  # whose heads do not depend on the hidden size
        options = {"head_dim": 16} | options
    if family == "qwen2":
        options = {name: value for name, value in options.items() if name != "head_dim"}
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied, **options)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # As they are saved: tied tables once.
    shapes = {
        name.removeprefix(PREFIX): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    record = json.loads((tmp_path / "config.json").read_text())
    assert expected_shapes(record) == shapes


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen3_moe"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"num_key_value_heads": None},
        {"vocab_size": "48"},
    ],
)
def test_nothing_is_expected_of_tensors_that_do_not_follow_from_the_configuration(
    change: dict[str, Any],
) -> None:
    record: dict[str, Any] = {"model_type": "llama", **SIZES}
    assert len(expected_shapes(record)) == 3 + 3 * 9
    assert expected_shapes(record | change) == {}
    assert expected_shapes(record | {"model_type": "qwen3"}) == {}  # without head_dim


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_folder(tmp_path / "model", tied=False)


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(dict(tensors), path, {"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def errors_of(folder: Path, num_learners: int = 1) -> list[str]:
    """What the checks before a run find, each as an error of model.path."""
    config = build_config(
        {
            "model": {"path": str(folder)},
            "task": {"name": "arithmetic"},
            "actors": {"engine": "torch", "max_new_tokens": 8},
            "cluster": {"learners": num_learners},
        }
    )
    findings = Findings()
    check_model(config, folder, findings)
    for error in findings.errors:
        assert isinstance(error, ConfigError)
        assert (error.field, error.value) == ("model.path", str(folder))
    return [str(error) for error in findings.errors]


@pytest.mark.parametrize(
    "lacked", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_found_before_the_learner_refuses_it(folder: Path, lacked: str) -> None:
    assert errors_of(folder) == []
    change_tensors(
        folder, lambda tensors: {name: tensors[name] for name in tensors.keys() - {lacked}}
    )
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load_model(folder, device="cpu")
    [error] = errors_of(folder)
    name = lacked.removeprefix("model.")
    assert f"lack 1 tensor that its config.json describes, such as {name}; download" in error


def test_another_shape_is_found_before_the_learner_refuses_it(folder: Path) -> None:
    set_config(folder, vocab_size=50)
    with pytest.raises(ModelError):
        load_model(folder, device="cpu")
    [error] = errors_of(folder)
    assert "2 tensors of another shape" in error
    assert f"such as embed_tokens.weight: [{len(VOCABULARY)}, 32] instead of [50, 32]" in error


def test_the_folder_of_a_base_model_lacks_the_prefix_and_only_the_head(folder: Path) -> None:
    change_tensors(
        folder,
        lambda tensors: {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if name != "lm_head.weight"
        },
    )
    [error] = errors_of(folder)
    assert "lack 1 tensor that its config.json describes, such as lm_head.weight" in error
    set_config(folder, tie_word_embeddings=True)
    load_model(folder, device="cpu")
    assert errors_of(folder) == []


def test_a_head_of_its_own_contradicts_tied_embeddings_with_several_learners(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    assert errors_of(folder) == []  # one learner loads what the files have
    [error] = errors_of(folder, num_learners=2)
    assert "a head of its own (lm_head.weight), although its config.json sets tie_word" in error
    assert "set cluster.learners to 1" in error

    def with_equal_tables(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    change_tensors(folder, with_equal_tables)  # which transformers ties
    assert errors_of(folder, num_learners=2) == []


def test_tied_embeddings_may_have_the_name_of_the_head(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    change_tensors(
        folder,
        lambda tensors: {
            name: tensors[name] for name in tensors.keys() - {"model.embed_tokens.weight"}
        },
    )
    load_model(folder, device="cpu")
    assert errors_of(folder, num_learners=2) == []


def test_heads_are_compared_to_their_last_byte(folder: Path) -> None:
    def with_one_other_value(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        return tensors | {"lm_head.weight": head}

    change_tensors(folder, with_one_other_value)
    weights, _ = read_weights(folder)
    assert weights is not None
    record = {"tie_word_embeddings": True}
    [fault] = tensor_faults(record, weights, num_learners=2)
    assert "head of its own" in fault
    assert list(tensor_faults(record, weights, num_learners=1)) == []
