"""vLLM on a CPU as a contestant of benchmarks/engine.py: the same model, requests and threads."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import copy_tokenizer
from speed_async.actors.engine import GenerationRequest
from speed_async.config.load import build_config
from speed_async.launcher.roles.engine_environment import engine_environment

START_S = 300.0


class RunningVllm:
    """vLLM's own AsyncLLM in an event loop of its own; its engine is another process."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._llm = llm
        self._loop = loop

    def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """The number of tokens."""

        async def all_of_them() -> int:
            outputs = await asyncio.gather(*(self._llm.generate(each) for each in requests))
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        return asyncio.run_coroutine_threadsafe(all_of_them(), self._loop).result()


def children_cpu_s() -> float:
    """CPU time of all child processes so far: of the engine, if it runs."""
    children = psutil.Process().children(recursive=True)
    return sum(sum(child.cpu_times()[:2]) for child in children)


@contextmanager
def running_vllm(model: Any, *, num_slots: int, num_threads: int) -> Iterator[RunningVllm]:
    """vLLM with the weights of this model."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        copy_tokenizer(folder)  # vLLM reads one, although the requests need none
        model.save_pretrained(folder)
        config = build_config(
            {
                "algorithm": "rloo",
                "run": {"folder": f"{name}/run"},
                "model": {"path": str(folder), "context_length": 256},
                "task": {"name": "arithmetic"},
                "actors": {
                    "engine": "vllm",
                    "slots": num_slots,
                    "num_threads": num_threads,
                    "max_new_tokens": 64,
                },
            }
        )
        os.environ.update(engine_environment(config))
        from benchmarks.bare_vllm import BareVllm

        engine = BareVllm(config)
        asyncio.run_coroutine_threadsafe(engine.__aenter__(), loop).result(START_S)
        try:
            yield RunningVllm(engine, loop)
        finally:
            asyncio.run_coroutine_threadsafe(engine.__aexit__(None, None, None), loop).result(
                START_S
            )
            loop.call_soon_threadsafe(loop.stop)
            thread.join(START_S)
