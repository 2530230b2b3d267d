"""Compare the torch engine with `model.generate`, in useful tokens per second.

Useful tokens are the requested ones. `model.generate` cannot stop rows at individual lengths, so it
runs to the longest one, and the surplus is not counted: this is what its users experience with
completions of mixed length. The order of the contestants alternates, and ratios are taken within
one repeat under the same machine load. On a shared machine, only the ratios by CPU time are
reproducible. `core` is the engine without its asynchronous wrapper. With `--vllm`, vLLM on the same
model is a contestant too; its CPU time is that of its engine process and of the requests here.

Usage: python -m benchmarks.engine [--size 0.8M|30M|135M] [--slots N ...] [--per-slot N]
           [--repeats N] [--threads N] [--vllm]
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engine_vllm import RunningVllm, children_cpu_s, running_vllm
from benchmarks.harness import MODEL_SHAPES, report
from speed_async.actors.engine import GenerationRequest
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.worker import ThreadWorker
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.weight_sync.buckets import flatten_parameters

NUM_PROMPT_TOKENS = 14
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 4, 64
PROMPT_VOCABULARY_SIZE = 32


def random_llama(size: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODEL_SHAPES[size], max_position_embeddings=256, eos_token_id=None, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def mixed_requests(count: int, seed: int, per_prompt: int = 1) -> list[GenerationRequest]:
    """`per_prompt` requests for each random prompt; forced lengths uniform in 4..64."""
    random = np.random.default_rng(seed)
    prompts = random.integers(1, PROMPT_VOCABULARY_SIZE, (count, NUM_PROMPT_TOKENS), np.int32)
    return [
        GenerationRequest(
            prompt_token_ids=prompts[i // per_prompt],
            max_new_tokens=int(random.integers(MIN_NEW_TOKENS, MAX_NEW_TOKENS + 1)),
            temperature=1.0,
            top_p=1.0,
            priority=0,
        )
        for i in range(count)
    ]


def new_generator(model: Any, num_slots: int) -> TorchGenerator:
    flatten_parameters(model)  # as the actor does
    return TorchGenerator(
        model,
        num_slots=num_slots,
        context_length=256,
        eos_token_ids=(),
        random=torch.Generator().manual_seed(0),
    )


def by_generate(model: Any, requests: list[GenerationRequest], batch: int) -> int:
    """Useful tokens of `model.generate` with `batch` sequences at a time."""
    for start in range(0, len(requests), batch):
        prompts = np.stack([r.prompt_token_ids for r in requests[start : start + batch]])
        longest = max(r.max_new_tokens for r in requests[start : start + batch])
        input_ids = torch.from_numpy(prompts).long()
        with torch.inference_mode():
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
                min_new_tokens=longest,
            )
    return sum(r.max_new_tokens for r in requests)


def by_core(generator: TorchGenerator, requests: list[GenerationRequest]) -> int:
    for key, request in enumerate(requests):
        generator.submit(key, request)
    num_tokens = 0
    while generator.has_work:
        num_tokens += sum(finished.sampled.num_tokens for finished in generator.step())
    return num_tokens


def by_engine(generator: TorchGenerator, requests: list[GenerationRequest]) -> int:
    """Through the asynchronous wrapper, one task per request."""

    async def run() -> int:
        async with SteppedEngine(ThreadWorker(lambda: generator)) as engine:
            results = await asyncio.gather(*(engine.generate(request) for request in requests))
        return sum(sampled.num_tokens for sampled in results)

    return asyncio.run(run())


def rate(contestant: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second of wall-clock time, and of CPU time over all threads and processes."""
    start_s, start_cpu_s = time.perf_counter(), _cpu_s()
    num_tokens = contestant()
    return (
        num_tokens / (time.perf_counter() - start_s),
        num_tokens / (_cpu_s() - start_cpu_s),
    )


def _cpu_s() -> float:
    return time.process_time() + children_cpu_s()


def compare(arguments: argparse.Namespace, num_slots: int, per_prompt: int) -> dict[str, object]:
    if not arguments.vllm:
        return _compare(arguments, num_slots, per_prompt, None)
    model, num_threads = random_llama(arguments.size), arguments.threads
    with running_vllm(model, num_slots=num_slots, num_threads=num_threads) as vllm:
        return _compare(arguments, num_slots, per_prompt, vllm)


def _compare(
    arguments: argparse.Namespace, num_slots: int, per_prompt: int, vllm: RunningVllm | None
) -> dict[str, object]:
    # Separate models: the generator prepares its own for decoding.
    plain, owned = random_llama(arguments.size), random_llama(arguments.size)
    generator = new_generator(owned, num_slots)
    requests = mixed_requests(arguments.per_slot * num_slots, 1, per_prompt)
    contestants: dict[str, Callable[[], int]] = {
        "generate": lambda: by_generate(plain, requests, num_slots),
        "core": lambda: by_core(generator, requests),
        "engine": lambda: by_engine(generator, requests),
    }
    if vllm is not None:
        contestants["vllm"] = lambda: vllm.generate(requests)
        vllm.generate(requests[:num_slots])
    by_core(generator, requests[:num_slots])
    by_generate(plain, requests[:num_slots], num_slots)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for repeat in range(arguments.repeats):
        names = list(contestants)
        for name in names if repeat % 2 == 0 else reversed(names):
            rates[name].append(rate(contestants[name]))
    row: dict[str, object] = {
        "slots": num_slots,
        "per_prompt": per_prompt,
        "threads": arguments.threads,
        **{name: statistics.median(wall for wall, _ in pairs) for name, pairs in rates.items()},
        "engine/generate": _ratio(rates["engine"], rates["generate"], 0),
        "by_CPU_time": _ratio(rates["engine"], rates["generate"], 1),
        "engine/core": _ratio(rates["engine"], rates["core"], 0),
        "core_by_CPU_time": _ratio(rates["engine"], rates["core"], 1),
    }
    if vllm is not None:
        row["engine/vllm"] = _ratio(rates["engine"], rates["vllm"], 0)
        row["vllm_by_CPU_time"] = _ratio(rates["engine"], rates["vllm"], 1)
    return row


def _ratio(over: list[tuple[float, float]], under: list[tuple[float, float]], which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(over, under, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=MODEL_SHAPES, default="0.8M")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--per-slot", type=int, default=8, help="sequences per slot")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", action="store_true", help="also vLLM, if it is installed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        compare(arguments, num_slots, per_prompt)
        for num_slots in arguments.slots
        for per_prompt in (1, 4)
    ]
    title = (
        f"Useful tokens/s, Llama of {arguments.size} parameters, prompts of {NUM_PROMPT_TOKENS}, "
        f"completions of {MIN_NEW_TOKENS}..{MAX_NEW_TOKENS} tokens, {arguments.per_slot} sequences "
        "per slot (generate runs each batch to its longest; only requested tokens count), "
        f"{arguments.repeats} interleaved repeats"
    )
    report("engine" if arguments.size == "0.8M" else f"engine_{arguments.size}", title, rows)


if __name__ == "__main__":
    main()
