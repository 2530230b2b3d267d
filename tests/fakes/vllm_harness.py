"""A real vLLM on the CPU that many tests share, and a real sender that it receives from.

Starting vLLM takes about 30 s, so the engines of the tests share one running vLLM: entering an
engine resets its state, exiting aborts its requests.
"""

import asyncio
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch

from speed_async.actors.vllm_engine.engine import StartedLlm, VllmEngine
from speed_async.actors.vllm_engine.environment import process_environment
from speed_async.actors.vllm_engine.start import start_llm
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.canary_check import Canary, canary_token_ids
from tests.fakes.engine_contract import CONTEXT_LENGTH
from tests.fakes.tiny_models import save_tiny_folder, tiny_model

HEAD_DIM = 32
"""The smallest head dimension that vLLM supports on a CPU."""
MAX_SHARD_SIZE = "50KB"
"""Less than the model: vLLM loads its weights from several files."""
CPU = torch.device("cpu")


@functools.cache
def vllm_model(*, tied: bool, seed: int = 0) -> Any:
    """Cached, because creating a model takes as long as a whole completion."""
    return tiny_model("llama", tied=tied, seed=seed, head_dim=HEAD_DIM)


def vllm_config(folder: Path, *, tied: bool, slots: int = 2, **actors: Any) -> Config:
    model = save_tiny_folder(
        folder / "model", tied=tied, head_dim=HEAD_DIM, max_shard_size=MAX_SHARD_SIZE
    )
    assert len(list(model.glob("*.safetensors"))) > 1
    vllm = {"enforce_eager": True, "tensor_parallel": actors.pop("tensor_parallel", 1)}
    return build_config(
        {
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


class SenderBackedEngine(VllmEngine):
    """Before each update, a real sender broadcasts the harness's `weights` over gloo."""

    def __init__(
        self, start_llm: Callable[[], StartedLlm], harness: "VllmHarness", **kwargs: Any
    ) -> None:
        super().__init__(start_llm, **kwargs)
        self._harness = harness

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._llm.resume_generation()
        await self._llm.reset_prefix_cache()
        return self

    async def __aexit__(self, *details: Any) -> None:
        request_ids = [*self._live]
        await super().__aexit__(*details)
        if request_ids:
            await self._llm.abort(request_ids, internal=True)

    async def update_weights(self, offer: WeightOffer) -> Any:
        return await super().update_weights(self._harness.send(offer))


class VllmHarness:
    """A running vLLM and a sender of `weights(version)` with the canary `canary(version)`."""

    def __init__(self, config: Config, *, tied: bool) -> None:
        self._config = config
        self._runner = asyncio.Runner()
        self._started = start_llm(config, seed=0)
        self._sender = TorchSender(host="127.0.0.1", bucket_bytes=4096, device=CPU)
        self._threads: list[Thread] = []
        self.tied = tied
        self.weights: Callable[[int], Any] = lambda _: vllm_model(tied=tied)
        self.canary: Callable[[int], Canary] = lambda version: canary_of(self.weights(version))
        self.errors: list[Exception] = []
        self.epoch = 1

    @property
    def llm(self) -> Any:
        return self._started.llm

    def start(self, **kwargs: Any) -> SenderBackedEngine:
        """An engine on this vLLM; without `eos_token_ids`, completions end by length only."""
        settings: dict[str, Any] = {"recompute_at_update": True, "eos_token_ids": ()} | kwargs
        eos_token_ids = settings.pop("eos_token_ids")
        started = replace(self._started, eos_token_ids=eos_token_ids, close=lambda: None)
        return SenderBackedEngine(lambda: started, self, **settings)

    def run(self, coroutine: Any) -> Any:
        """Run on one event loop, as vLLM's tasks require."""
        return self._runner.run(coroutine)

    def send(self, offer: WeightOffer) -> WeightOffer:
        """Start sending in a thread; returns the offer for the engine."""
        host, port = self._sender.store_address
        num_workers = self._config.actors.vllm.tensor_parallel
        offer = replace(
            offer,
            store_host=host,
            store_port=port,
            epoch=self.epoch,
            rank=1,
            world_size=1 + num_workers,
        )
        model, canary = self.weights(offer.policy_version), self.canary(offer.policy_version)

        def send() -> None:
            named = [(name, each.detach()) for name, each in model.named_parameters()]
            try:
                self._sender.send(replace(offer, rank=0), named, canary)
            except Exception as error:  # checked by the test
                self.errors.append(error)

        self._threads.append(Thread(target=send))
        self._threads[-1].start()
        return offer

    def close(self) -> None:
        for thread in self._threads:
            thread.join(30)
        self._sender.close()
        self._started.close()
        self._runner.close()
