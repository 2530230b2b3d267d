"""Families that are refused from config.json alone, as transformers writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
    xLSTMConfig,
)

from speed_async.config.model_facts import read_model_info
from speed_async.config.model_family import family_faults, routing_notice

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}
LINEAR, DYNAMIC = ({"rope_type": kind, "factor": 4.0} for kind in ("linear", "dynamic"))


def faults(folder: Path, config: Any, context_length: int | None = None) -> list[str]:
    config.save_pretrained(folder)
    return list(family_faults(read_model_info(folder).record, context_length))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Gemma2Config(), ["final_logit_softcapping = 30.0", "attn_logit_softcapping = 50.0"]),
        (CohereConfig(), ["logit_scale = 0.0625"]),
        (GraniteConfig(logits_scaling=8.0), ["logits_scaling = 8.0"]),
        (xLSTMConfig(), ["output_logit_soft_cap = 30.0"]),
        (GraniteConfig(), []),
        (Gemma3TextConfig(), []),
        (LlamaConfig(), []),
        (LlamaConfig(rope_parameters=LINEAR), []),
    ],
)
def test_caps_and_scales_are_recognised_by_name(tmp_path: Path, config: Any, expected: list[str]):
    found = faults(tmp_path, config, 1024)
    assert len(found) == len(expected)
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(start) and "choose another model family" in fault


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (Phi3Config(max_position_embeddings=131072, rope_parameters=LONG), 4096),
        (LlamaConfig(max_position_embeddings=2048, rope_parameters=DYNAMIC), 2048),
    ],
)
def test_embeddings_that_depend_on_the_batch_are_refused_beyond_their_limit(
    tmp_path: Path, config: Any, limit: int
):
    assert faults(tmp_path, config, limit) == []
    for context_length in (limit + 1, None):
        [fault] = faults(tmp_path, config, context_length)
        assert f"set model.context_length to at most {limit}" in fault


def test_a_cap_in_the_text_part_of_a_larger_model_is_found(tmp_path: Path):
    record = {"model_type": "gemma3", "text_config": {"final_logit_softcapping": 20.0}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    [fault] = family_faults(read_model_info(tmp_path).record, 1024)
    assert fault.startswith("final_logit_softcapping = 20.0")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (Qwen3MoeConfig(num_experts=16), 16),
        (MixtralConfig(num_local_experts=4), 4),
        (DeepseekV3Config(n_routed_experts=32), 32),
        (LlamaConfig(), 0),
    ],
)
def test_a_mixture_of_experts_is_said_to_be_routed_anew(
    tmp_path: Path, config: Any, count: int
) -> None:
    config.save_pretrained(tmp_path)
    notice = routing_notice(read_model_info(tmp_path).record)
    assert notice.startswith(f"mixture of {count} experts: ") if count else notice == ""
