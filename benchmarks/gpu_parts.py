"""The parts of benchmarks/gpu_check.py that are measured in a process of their own.

Usage: python -m benchmarks.gpu_parts PART [--device cpu|cuda] [--size SIZE] [--row-tokens N]
           [--rows N]; prints one JSON line of rows
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import torch

from benchmarks.engine import by_core, mixed_requests
from benchmarks.gpu_setup import (
    Options,
    Row,
    add_options,
    dtype,
    indexed,
    matmul_flops_per_s,
    now_s,
    random_model,
    row,
    seconds,
)
from benchmarks.gpu_update import sharded, update
from speed_async.actors.torch_engine.generator import TorchGenerator
from speed_async.types import WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.digests import tensor_digests, verify_digests
from speed_async.weight_sync.nccl import await_work, start_broadcast
from speed_async.weight_sync.process_group import host_store, make_group

NUM_SLOTS = 64


def matmul(options: Options) -> list[Row]:
    return [row("matrix product", "TFLOP/s", matmul_flops_per_s(options.device) / 1e12)]


def weights(options: Options) -> list[Row]:
    """Two transfers over ipc to another process, until it has checked the digests; the second one
    is measured."""
    device = indexed(options.device)
    model = random_model(options, context=256, dtype=dtype(options.device))
    num_bytes = flatten_parameters(model)
    named = [(name, each.detach()) for name, each in model.named_parameters()]
    sender = TorchSender(host="127.0.0.1", bucket_bytes=256 << 20, device=device)
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=2,
        store_host="127.0.0.1",
        store_port=sender.store_address[1],
        backend="ipc",
        deadline_s=40.0,
    )
    context = multiprocessing.get_context("spawn")
    is_verified = context.Event()
    peer = context.Process(target=_receive, args=(options, offer, is_verified), daemon=True)
    peer.start()
    for version in (1, 2):
        for _, tensor in named:
            tensor.add_(version)
        began_s = now_s(options.device)
        sender.send(replace(offer, policy_version=version), named)
        # ipc ends when the receiver may read: it has the weights once it has checked them.
        if not is_verified.wait(40.0):
            raise RuntimeError("the receiver did not verify the weights within 40 s")
        transfer_s = now_s(options.device) - began_s
        is_verified.clear()
    peer.join(40.0)
    sender.close()
    if peer.exitcode != 0:
        raise RuntimeError(f"the receiver ended with {peer.exitcode}")
    copies = [each.clone() for _, each in named]
    began_s = now_s(options.device)
    for copy, (_, each) in zip(copies, named, strict=True):
        copy.copy_(each)
    copy_s = now_s(options.device) - began_s
    return [
        row("weights over ipc", "GB/s", num_bytes / transfer_s / 1e9),
        row("weights over ipc", "time over a copy in the device", transfer_s / copy_s),
    ]


def _receive(options: Options, offer: WeightOffer, is_verified: Event) -> None:
    model = random_model(options, context=256, dtype=dtype(options.device))
    flatten_parameters(model)
    named = [(name, each.detach()) for name, each in model.named_parameters()]
    local = dict(named)
    receiver = TorchReceiver(device=indexed(options.device), in_place=True)

    def load(tensors: Any) -> None:
        for name, tensor in tensors:
            local[name].copy_(tensor)

    for version in (1, 2):
        received = receiver.receive(replace(offer, policy_version=version, rank=1), named, load)
        verify_digests(received.digests, tensor_digests(named), policy_version=version)
        is_verified.set()
    receiver.close()


def engine(options: Options) -> list[Row]:
    model = random_model(options, context=256, dtype=dtype(options.device))
    requests = mixed_requests(4 * NUM_SLOTS, 1)
    generate_s = seconds(options.device, lambda: _by_generate(model, requests, options.device))
    generator = TorchGenerator(
        model,
        num_slots=NUM_SLOTS,
        context_length=256,
        eos_token_ids=(),
        random=torch.Generator(options.device).manual_seed(0),
    )
    engine_s = seconds(options.device, lambda: by_core(generator, requests))
    num_tokens = sum(request.max_new_tokens for request in requests)
    return [
        row("torch engine", "tokens/s", num_tokens / engine_s),
        row("torch engine", "over model.generate", generate_s / engine_s, aim="2"),
    ]


def _by_generate(model: Any, requests: list[Any], device: str) -> None:
    for start in range(0, len(requests), NUM_SLOTS):
        batch = requests[start : start + NUM_SLOTS]
        longest = max(request.max_new_tokens for request in batch)
        ids = torch.from_numpy(np.stack([each.prompt_token_ids for each in batch])).long()
        ids = ids.to(device)
        lengths = {"max_new_tokens": longest, "min_new_tokens": longest}
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **lengths
            )


def nccl(options: Options) -> list[Row]:
    """The constructor that runs use, with one rank: it fails if this NCCL lacks what it needs."""
    device = indexed("cuda")
    store = host_store("127.0.0.1", 30.0)
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=1,
        store_host="127.0.0.1",
        store_port=store.port,
        backend="nccl",
        deadline_s=30.0,
    )
    began_s = time.perf_counter()
    group = make_group(store, offer, device, lambda: False)
    made_s = time.perf_counter() - began_s
    values = torch.ones(1 << 20, device=device)
    await_work(start_broadcast(group, values, 30.0, lambda: False), 30.0, lambda: False)
    group.abort()
    return [row("NCCL, one rank", "s to make", made_s)]


PARTS: dict[str, Callable[[Options], list[Row]]] = {
    "matmul": matmul,
    "update": update,
    "sharded": sharded,
    "weights": weights,
    "engine": engine,
    "nccl": nccl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    add_options(parser)
    options = parser.parse_args()
    print("\n" + json.dumps(PARTS[options.part](options)), flush=True)


if __name__ == "__main__":
    main()
