"""Model folders: loading a valid folder, and errors for invalid ones."""

import asyncio
import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from speed_async.actors.model_folder import load_model_folder, load_tokenizer
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.torch_engine.engine import load_torch_generator
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.actors.vllm_engine.options import ServingInfo
from speed_async.config.load import build_config
from speed_async.config.sections.actors import ActorsConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.errors import ConfigError, ModelError
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from tests.fakes.engine_contract import gather, request, start_all
from tests.fakes.tiny_models import (
    CONTEXT_LENGTH,
    EOS_TOKEN_ID,
    FAMILIES,
    save_tiny_folder,
    save_tokenizer,
    tiny_model,
)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_engine_starts_from_a_model_folder(tmp_path: Path, family: str, tied: bool) -> None:
    save_tiny_folder(tmp_path, family=family, tied=tied)

    async def run() -> None:
        actors = ActorsConfig(slots=4, device="cpu")
        make = partial(load_torch_generator, ModelConfig(path=str(tmp_path)), actors, seed=3)
        async with SteppedEngine(ThreadWorker(make)) as engine:
            [sampled] = await gather(start_all(engine, [request(8)]))
            assert sampled.num_tokens == 8 or sampled.finish_reason == "stop"
        loaded = load_model_folder(tmp_path, device="cpu")
        assert loaded.context_length == CONTEXT_LENGTH
        assert loaded.eos_token_ids == (EOS_TOKEN_ID,)
        assert next(loaded.model.parameters()).dtype == torch.float32

    asyncio.run(run())


def test_completions_stop_at_the_configured_stop_tokens(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    special = set(tokenizer.all_special_ids)
    text, token_id = next((t, i) for t, i in tokenizer.get_vocab().items() if i not in special)
    loaded = load_model_folder(tmp_path, device="cpu", stop_tokens=[text])
    assert loaded.eos_token_ids == tuple(sorted({EOS_TOKEN_ID, token_id}))
    config = build_config(
        {
            "model": {"path": str(tmp_path), "stop_tokens": [text]},
            "task": {"name": "arithmetic"},
        }
    )
    assert ServingInfo(config).eos_token_ids == loaded.eos_token_ids
    with pytest.raises(ConfigError, match=r"model\.stop_tokens.*is not one token of this model"):
        load_model_folder(tmp_path, device="cpu", stop_tokens=["no token"])


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent does not exist: set model\.path"):
        load_torch_generator(ModelConfig(path=str(tmp_path / "absent")), ActorsConfig(), seed=0)


def test_folder_without_weights_raises(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file: download"):
        load_model_folder(tmp_path)


def test_tokenizer_without_eos_raises(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path)
    save_tokenizer(tmp_path, eos=False)
    with pytest.raises(ModelError, match="no EOS token"):
        load_model_folder(tmp_path)


def test_sliding_window_shorter_than_the_context_raises(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path, family="qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"sliding_window": 32, "use_sliding_window": True}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"window of 32 tokens, .* at most 32"):
        load_model_folder(tmp_path, device="cpu")
    assert load_model_folder(tmp_path, context_length=32, device="cpu").context_length == 32


def test_context_length_above_the_model_limit_raises(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path)
    with pytest.raises(ModelError, match=r"context_length = 97, but .* supports 96"):
        load_model_folder(tmp_path, context_length=97, device="cpu")
    assert load_model_folder(tmp_path, context_length=40, device="cpu").context_length == 40


def test_a_bfloat16_engine_receives_from_a_float32_learner(tmp_path: Path) -> None:
    """As with a float32 folder on a GPU, which engines load in half precision."""
    save_tiny_folder(tmp_path, tied=False)
    model = tiny_model("llama", tied=False, seed=1)
    learner = {name: each.detach() for name, each in model.named_parameters()}
    sender = TorchSender(host="127.0.0.1", bucket_bytes=4096, device=torch.device("cpu"))
    host, port = sender.store_address
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=2,
        store_host=host,
        store_port=port,
        backend="gloo",
        deadline_s=30.0,
    )
    loaded = load_model_folder(tmp_path, device="cpu", dtype=torch.bfloat16)
    engine = TorchGenerator(
        loaded.model,
        num_slots=2,
        context_length=loaded.context_length,
        eos_token_ids=loaded.eos_token_ids,
        random=torch.Generator(),
        receiver=TorchReceiver(device=torch.device("cpu"), in_place=True),
    )
    sending = threading.Thread(target=sender.send, args=(offer, learner.items()))
    sending.start()
    engine.load_weights(replace(offer, rank=1))
    sending.join()
    sender.close()
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, learner[name].bfloat16()), name
    assert engine.stats().policy_version == 1
