"""Packed broadcast against one flat tensor of the same bytes, and against one call a tensor.

All contestants use gloo on loopback between the same processes; the packed one also announces,
checks, packs and loads, the others only move bytes. Each time ends when every process has all of
it (a barrier, which is in every contestant's time). The contestants take turns within one repeat,
where all met the same machine.

Usage: python -m benchmarks.weights
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._C._distributed_c10d import PrefixStore

from benchmarks.harness import report
from speed_async.types import WeightOffer
from speed_async.weights.broadcast import TorchReceiver, TorchSender
from speed_async.weights.channel import NamedTensor
from speed_async.weights.process_group import (
    broadcast_from_sender,
    host_store,
    make_group,
    reach_store,
)

MIB = 1024 * 1024
BUCKET_BYTES = 64 * MIB
DEADLINE_S = 120.0
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    num_tensors: int
    tensor_bytes: int
    num_receivers: int
    num_repeats: int

    @property
    def num_bytes(self) -> int:
        return self.num_tensors * self.tensor_bytes


CASES = (
    Case(name="large", num_tensors=128, tensor_bytes=4 * MIB, num_receivers=1, num_repeats=5),
    Case(name="many", num_tensors=300, tensor_bytes=64 * 1024, num_receivers=1, num_repeats=15),
    Case(name="tiny", num_tensors=40, tensor_bytes=80_000, num_receivers=1, num_repeats=50),
    Case(name="tiny", num_tensors=40, tensor_bytes=80_000, num_receivers=2, num_repeats=50),
)


def measure(
    case: Case, raw_offer: WeightOffer, store, packed: Callable[[list[NamedTensor]], object]
) -> dict[str, list[float]]:
    """Seconds of every repeat by contestant; all ranks run this in step."""
    group = make_group(PrefixStore("raw", store), raw_offer, CPU)
    named = [
        (f"layer.{index}.weight", torch.ones(case.tensor_bytes // 4))
        for index in range(case.num_tensors)
    ]
    flat = torch.ones(case.num_bytes, dtype=torch.uint8)

    def send_flat() -> None:
        broadcast_from_sender(group, flat, DEADLINE_S, "gloo")

    def send_each() -> None:
        for _, tensor in named:
            broadcast_from_sender(group, tensor, DEADLINE_S, "gloo")

    contestants = {"packed": lambda: packed(named), "flat": send_flat, "each": send_each}
    times_s: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(case.num_repeats + 1):
        for name in sorted(contestants, reverse=bool(repeat % 2)):
            group.barrier().wait()
            began_s = time.perf_counter()
            contestants[name]()
            group.barrier().wait()
            if repeat:  # the first repeat makes groups and buffers
                times_s[name].append(time.perf_counter() - began_s)
    return times_s


def receive(case: Case, rank: int, raw_offer: WeightOffer, first: WeightOffer) -> None:
    torch.set_num_threads(1)
    receiver = TorchReceiver(device=CPU)
    num_received = 0

    def take(named: list[NamedTensor]) -> None:
        nonlocal num_received
        num_received += 1
        offer = replace(first, policy_version=num_received, rank=rank)
        ours = dict(named)

        def load(tensors) -> None:
            for name, tensor in tensors:
                ours[name].copy_(tensor)

        receiver.receive(offer, named, load)

    raw_offer = replace(raw_offer, rank=rank)
    measure(case, raw_offer, reach_store(raw_offer), take)
    receiver.close()


def play(case: Case) -> dict[str, object]:
    sender = TorchSender(host="127.0.0.1", bucket_bytes=BUCKET_BYTES, device=CPU)
    raw_store = host_store("127.0.0.1", DEADLINE_S)
    first = offer_for(case, sender.store_address[1])
    raw_offer = offer_for(case, raw_store.port)
    context = multiprocessing.get_context("spawn")
    peers = [
        context.Process(target=receive, args=(case, rank, raw_offer, first), daemon=True)
        for rank in range(1, case.num_receivers + 1)
    ]
    for peer in peers:
        peer.start()
    num_sent = 0

    def give(named: list[NamedTensor]) -> None:
        nonlocal num_sent
        num_sent += 1
        sender.send(replace(first, policy_version=num_sent), named)

    times_s = measure(case, raw_offer, raw_store, give)
    for peer in peers:
        peer.join(DEADLINE_S)
    sender.close()
    return row_of(case, times_s)


def row_of(case: Case, times_s: dict[str, list[float]]) -> dict[str, object]:
    packed, flat, each = times_s["packed"], times_s["flat"], times_s["each"]
    seconds = statistics.median(packed)
    return {
        "case": case.name,
        "tensors": case.num_tensors,
        "mib": case.num_bytes / MIB,
        "receivers": case.num_receivers,
        "packed_ms": 1000 * seconds,
        "packed_gib_per_s": case.num_bytes / seconds / (1024 * MIB),
        "flat_ms": 1000 * statistics.median(flat),
        "each_ms": 1000 * statistics.median(each),
        "speed_over_flat": statistics.median(f / p for f, p in zip(flat, packed, strict=True)),
        "speed_over_each": statistics.median(e / p for e, p in zip(each, packed, strict=True)),
    }


def offer_for(case: Case, port: int) -> WeightOffer:
    return WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=case.num_receivers + 1,
        store_host="127.0.0.1",
        store_port=port,
        backend="gloo",
        deadline_s=DEADLINE_S,
    )


def main() -> None:
    torch.set_num_threads(1)
    title = (
        "Weight broadcast, gloo on loopback: packed (announced, checked, packed, loaded) against"
        " one flat tensor and against one broadcast a tensor (both bare)"
    )
    report("weights", title, [play(case) for case in CASES])


if __name__ == "__main__":
    main()
