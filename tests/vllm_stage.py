"""One real vLLM on the CPU for many tests, and a real sender that it receives from.

Starting vLLM takes half a minute, so an engine's life is played on one that runs on: entering
makes it as good as new, leaving leaves nothing of it behind.
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
from engine_contract import CONTEXT_LENGTH
from tiny_models import save_tiny_folder, tiny_model

from speed_async.actors.vllm_engine.engine import OpenLlm, VllmEngine
from speed_async.actors.vllm_engine.options import process_environment
from speed_async.actors.vllm_engine.start import open_llm
from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.canary import Canary, canary_token_ids

HEAD_DIM = 32
"""The smallest that vLLM attends with on a CPU."""
CPU = torch.device("cpu")


@functools.cache
def vllm_model(*, tied: bool, seed: int = 0) -> Any:
    """Made once: making one takes as long as a whole completion."""
    return tiny_model("llama", tied=tied, seed=seed, head_dim=HEAD_DIM)


def vllm_config(folder: Path, *, tied: bool, slots: int = 2, **actors: Any) -> Config:
    model = save_tiny_folder(folder / "model", tied=tied, head_dim=HEAD_DIM)
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
    """What an actor's process has from its supervisor."""
    before = dict(os.environ)
    os.environ.update(process_environment(config, on_cpu=True))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def canary_of(model: Any) -> Canary:
    """What a learner with this model would send along."""
    token_ids = canary_token_ids(model.config.vocab_size, context_length=CONTEXT_LENGTH)
    tokens_1T = torch.tensor([token_ids])
    with torch.no_grad():
        logprobs_TV = model(tokens_1T).logits[0].log_softmax(-1)
    logprobs = logprobs_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0].tolist()
    return Canary(token_ids=token_ids, logprobs=tuple(logprobs))


class SentEngine(VllmEngine):
    """Before each update it lets a real sender send, over gloo, what `weights` gives."""

    def __init__(self, open_llm: Callable[[], OpenLlm], stage: "Stage", **more: Any) -> None:
        super().__init__(open_llm, **more)
        self._stage = stage

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._llm.resume_generation()
        await self._llm.reset_prefix_cache()
        return self

    async def __aexit__(self, *details: Any) -> None:
        live = [*self._live]
        await super().__aexit__(*details)
        if live:
            await self._llm.abort(live, internal=True)

    async def update_weights(self, offer: WeightOffer) -> Any:
        return await super().update_weights(self._stage.send(offer))


class Stage:
    """A running vLLM. `weights(version)` is what a sender sends as that version, with the canary
    of `canary(version)`."""

    def __init__(self, config: Config, *, tied: bool) -> None:
        self._config = config
        self._runner = asyncio.Runner()
        self._opened = open_llm(config, seed=0)
        self._sender = TorchSender(host="127.0.0.1", bucket_bytes=4096, device=CPU)
        self._threads: list[Thread] = []
        self.tied = tied
        self.weights: Callable[[int], Any] = lambda _: vllm_model(tied=tied)
        self.canary: Callable[[int], Canary] = lambda version: canary_of(self.weights(version))
        self.errors: list[Exception] = []
        self.epoch = 1

    @property
    def llm(self) -> Any:
        return self._opened.llm

    def start(self, **more: Any) -> SentEngine:
        """An engine on this vLLM whose completions only end by their length."""
        opened = replace(self._opened, eos_token_ids=(), close=lambda: None)
        settings: dict[str, Any] = {"recompute_at_update": True, "eos_token_ids": ()} | more
        opened = replace(opened, eos_token_ids=settings.pop("eos_token_ids"))
        return SentEngine(lambda: opened, self, **settings)

    def run(self, coroutine: Any) -> Any:
        """vLLM's tasks live on one event loop."""
        return self._runner.run(coroutine)

    def send(self, offer: WeightOffer) -> WeightOffer:
        """Begin to send in a thread; the offer that the engine is to take up."""
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
            except Exception as error:  # seen by the test
                self.errors.append(error)

        self._threads.append(Thread(target=send))
        self._threads[-1].start()
        return offer

    def close(self) -> None:
        for thread in self._threads:
            thread.join(30)
        self._sender.close()
        self._opened.close()
        self._runner.close()
