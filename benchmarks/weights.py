"""Compare ways to transfer a model's weights to its receivers on loopback.

- gloo, ipc: as in a run, with parameters flattened at both ends; announced, checked and loaded,
  with digests at both ends.
  With gloo only the kernel copies; with ipc there is one copy in and one copy out.
- gloo scattered, ipc scattered: the same for models with separate tensors, packed and loaded one
  by one.
- flat: one bare gloo broadcast of one tensor of the same size. each: one broadcast per tensor.
- memcpy: the sender copies the bytes once locally. digest: all ranks compute the digests, as they
  do once per transfer.

Each measurement ends when every process has all data (a barrier, included for every contestant).
The contestants alternate within one repeat, under the same machine load.

Usage: python -m benchmarks.weights [CASE ...]
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import nn
from torch._C._distributed_c10d import PrefixStore

from benchmarks.harness import report
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from speed_async.weight_sync.buckets import flatten_parameters
from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.digests import tensor_digests, verify_digests
from speed_async.weight_sync.process_group import host_store, make_group, reach_store

MIB = 1024 * 1024
BUCKET_BYTES = 64 * MIB
DEADLINE_S = 120.0
TIMEOUT = timedelta(seconds=DEADLINE_S)
CPU = torch.device("cpu")
BACKENDS: tuple[WeightBackend, ...] = ("gloo", "ipc")

Transfer = Callable[[list[NamedTensor]], object]


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
    Case(name="large", num_tensors=128, tensor_bytes=4 * MIB, num_receivers=1, num_repeats=9),
    Case(name="many", num_tensors=300, tensor_bytes=64 * 1024, num_receivers=1, num_repeats=25),
    Case(name="tiny", num_tensors=40, tensor_bytes=80_000, num_receivers=1, num_repeats=50),
    Case(name="tiny2", num_tensors=40, tensor_bytes=80_000, num_receivers=2, num_repeats=50),
)


def make_weights(case: Case, *, flat: bool) -> list[NamedTensor]:
    values = [torch.ones(case.tensor_bytes // 4) for _ in range(case.num_tensors)]
    model = nn.ParameterList(values)
    if flat:
        assert flatten_parameters(model) >= case.num_bytes
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def measure(
    case: Case, raw_offer: WeightOffer, store, transfers: dict[WeightBackend, Transfer]
) -> dict[str, list[float]]:
    """Seconds of every repeat by contestant. All ranks run this in lockstep."""
    group = make_group(PrefixStore("raw", store), raw_offer, CPU, lambda: False)
    flat, scattered = make_weights(case, flat=True), make_weights(case, flat=False)
    # Separate memory, because recently used memory of another contestant is still cached.
    one, source, copy = (torch.ones(case.num_bytes, dtype=torch.uint8) for _ in range(3))

    def send_each() -> None:
        for _, tensor in scattered:
            group.broadcast(tensor, 0, TIMEOUT).wait(TIMEOUT)

    contestants: dict[str, Callable[[], object]] = {
        "flat": lambda: group.broadcast(one, 0, TIMEOUT).wait(TIMEOUT),
        "each": send_each,
        "memcpy": lambda: raw_offer.rank == 0 and copy.copy_(source),
        "digest": lambda: tensor_digests(flat),
    }
    for backend in BACKENDS:
        transfer = transfers[backend]
        contestants[backend] = lambda transfer=transfer: transfer(flat)
        contestants[f"{backend} scattered"] = lambda transfer=transfer: transfer(scattered)
    times_s: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(case.num_repeats + 1):
        for name in sorted(contestants, reverse=bool(repeat % 2)):
            group.barrier().wait()
            start_s = time.perf_counter()
            contestants[name]()
            group.barrier().wait()
            if repeat:  # the first repeat creates groups and buffers
                times_s[name].append(time.perf_counter() - start_s)
    return times_s


def receive(case: Case, rank: int, raw_offer: WeightOffer, firsts: list[WeightOffer]) -> None:
    torch.set_num_threads(1)
    receivers = [TorchReceiver(device=CPU, in_place=True) for _ in firsts]

    def receiving(receiver: TorchReceiver, first: WeightOffer) -> Transfer:
        num_received = 0

        def take(named: list[NamedTensor]) -> None:
            nonlocal num_received
            num_received += 1
            local = dict(named)

            def load(tensors) -> None:
                for name, tensor in tensors:
                    local[name].copy_(tensor)

            offer = replace(first, policy_version=num_received, rank=rank)
            report = receiver.receive(offer, named, load)
            verify_digests(
                report.digests, tensor_digests(named), policy_version=offer.policy_version
            )

        return take

    raw_offer = replace(raw_offer, rank=rank)
    transfers: dict[WeightBackend, Transfer] = {
        first.backend: receiving(receiver, first)
        for receiver, first in zip(receivers, firsts, strict=True)
    }
    measure(case, raw_offer, reach_store(raw_offer), transfers)
    for receiver in receivers:
        receiver.close()


def sending(sender: TorchSender, first: WeightOffer) -> Transfer:
    num_sent = 0

    def send_weights(named: list[NamedTensor]) -> None:
        nonlocal num_sent
        num_sent += 1
        sender.send(replace(first, policy_version=num_sent), named)

    return send_weights


def run_case(case: Case) -> list[dict[str, object]]:
    senders = [
        TorchSender(host="127.0.0.1", bucket_bytes=BUCKET_BYTES, device=CPU) for _ in BACKENDS
    ]
    raw_store = host_store("127.0.0.1", DEADLINE_S)
    firsts = [
        offer_for(case, sender.store_address[1], backend)
        for sender, backend in zip(senders, BACKENDS, strict=True)
    ]
    raw_offer = offer_for(case, raw_store.port, "gloo")
    context = multiprocessing.get_context("spawn")
    peers = [
        context.Process(target=receive, args=(case, rank, raw_offer, firsts), daemon=True)
        for rank in range(1, case.num_receivers + 1)
    ]
    for peer in peers:
        peer.start()
    transfers: dict[WeightBackend, Transfer] = {
        first.backend: sending(sender, first) for sender, first in zip(senders, firsts, strict=True)
    }
    times_s = measure(case, raw_offer, raw_store, transfers)
    for peer in peers:
        peer.join(DEADLINE_S)
    for sender in senders:
        sender.close()
    return [row_of(case, times_s, name) for name in times_s]


def row_of(case: Case, times_s: dict[str, list[float]], name: str) -> dict[str, object]:
    """Ratios are medians over repeats of measurements adjacent in time."""

    def speed_over(other: str) -> float:
        pairs = zip(times_s[other], times_s[name], strict=True)
        return statistics.median(other_s / local for other_s, local in pairs)

    seconds = statistics.median(times_s[name])
    return {
        "case": f"{case.num_tensors} x {case.tensor_bytes // 1024} KiB",
        "receivers": case.num_receivers,
        "way": name,
        "ms": 1000 * seconds,
        "best_ms": 1000 * min(times_s[name]),
        "gb_per_s": case.num_bytes / seconds / 1e9,
        "over_flat": speed_over("flat"),
        "over_each": speed_over("each"),
        "over_memcpy": speed_over("memcpy"),
    }


def offer_for(case: Case, port: int, backend: WeightBackend) -> WeightOffer:
    return WeightOffer(
        policy_version=1,
        epoch=1,
        rank=0,
        world_size=case.num_receivers + 1,
        store_host="127.0.0.1",
        store_port=port,
        backend=backend,
        deadline_s=DEADLINE_S,
    )


def main() -> None:
    torch.set_num_threads(1)
    cases = [case for case in CASES if case.name in sys.argv[1:]] or list(CASES)
    title = "Weights to their receivers (announced, checked, loaded) against bare broadcasts"
    report("weights", title, [row for case in cases for row in run_case(case)])


if __name__ == "__main__":
    main()
