"""The decode path of Llama-like models equals the modules of transformers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.actors.torch_engine.llama_decoder import LlamaDecoder, supports
from speed_async.weight_sync.buckets import flatten_parameters
from tests.fakes.forced_logprobs import forced_logprobs, mixed_requests
from tests.fakes.tiny_models import CONTEXT_LENGTH, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases, wide heads": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True)
    ),
    "llama, tied, llama3 positions": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "qwen3, yarn positions": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN)
    ),
}


class OwnLlama(LlamaForCausalLM):
    """May compute something else than Llama."""


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # norms and biases start at 1 and 0
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.uniform_(-0.3, 0.3)
    return model


def assert_equals_modules(model: Any, plain: Any) -> None:
    core = TorchGenerator(
        model,
        num_slots=20,
        context_length=CONTEXT_LENGTH,
        eos_token_ids=(),
        random=torch.Generator().manual_seed(0),
    )
    requests = mixed_requests(40)
    for key, one in enumerate(requests):
        core.submit(key, one)
    finished = {}
    while core.has_work:
        finished.update({each.key: each.sampled for each in core.step()})
    for key, one in enumerate(requests):
        expected = forced_logprobs(plain, one, finished[key])
        np.testing.assert_allclose(finished[key].logprobs, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_flat", [False, True], ids=["separate", "flat"])
def test_logprobs_equal_those_of_the_modules(name: str, is_flat: bool) -> None:
    model = build(MODELS[name])
    assert supports(model)
    if is_flat:
        assert flatten_parameters(model) > 0
    assert_equals_modules(model, build(MODELS[name]))


def test_adjacent_projections_are_one_product_over_the_parameters_themselves() -> None:
    model = build(MODELS["llama"])
    assert len(LlamaDecoder(model)._layers[0].qkv.weights) == 3
    flatten_parameters(model)
    layer = LlamaDecoder(model)._layers[1]
    assert [len(each.weights) for each in (layer.qkv, layer.gate_up)] == [1, 1]
    model.model.layers[1].self_attn.v_proj.weight.fill_(7.0)  # as an update in place
    assert (layer.qkv.weights[0][-16:] == 7.0).all()
    assert (layer.qkv.weights[0][:-16] != 7.0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnLlama(LlamaConfig(**SIZES)),
        lambda: MistralForCausalLM(MistralConfig(**SIZES)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")),
        lambda: Qwen2ForCausalLM(
            Qwen2Config(
                **SIZES, use_sliding_window=True, sliding_window=CONTEXT_LENGTH, max_window_layers=1
            )
        ),
    ],
    ids=["own class", "mistral", "gelu", "sliding window"],
)
def test_other_models_use_their_modules(make: Callable[[], Any]) -> None:
    model = build(make)
    assert not supports(model)
    assert_equals_modules(model, build(make))
