"""A real vLLM on the CPU that many tests share, and a real sender that it receives from.

Starting vLLM takes about 30 s, so the engines of the tests share one running vLLM: entering an
engine resets its state, exiting aborts its requests.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any, Self

import torch

from speed_async.actors.vllm_engine.engine import StartedLlm, VllmEngine
from speed_async.actors.vllm_engine.start import start_llm
from speed_async.config.schema import Config
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchSender
from speed_async.weight_sync.canary_check import Canary
from tests.fakes.vllm_setup import canary_of, vllm_model

CPU = torch.device("cpu")


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
