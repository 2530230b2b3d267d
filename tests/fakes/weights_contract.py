"""Test harness for weight transfers, in memory and over every real backend."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import pytest
import torch
from torch import Tensor

from speed_async.errors import SpeedAsyncError
from speed_async.testing.memory_channel import MemoryReceiver, MemorySender, MemoryStore
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.broadcast import TorchReceiver, TorchSender
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import (
    LoadTensors,
    NamedTensor,
    TransferReport,
    WeightReceiver,
    WeightSender,
)

JOIN_S = 30.0
"""Timeout for joining a thread, which normally ends much earlier."""
MAX_MEMBERS = 4
NEEDS_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < MAX_MEMBERS,
    reason=f"nccl needs a GPU for each of {MAX_MEMBERS} members",
)
Outcome = TransferReport | Exception


@dataclass(kw_only=True)
class Loaded:
    """Arguments of one receiver's `load` calls: copies by name, and the names of each bucket."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    buckets: list[list[str]] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)

    def load(self, tensors: Sequence[NamedTensor]) -> None:
        self.buckets.append([name for name, _ in tensors])
        self.devices |= {tensor.device.type for _, tensor in tensors}
        self.tensors.update({name: tensor.to("cpu", copy=True) for name, tensor in tensors})


def mixed_tensors() -> list[NamedTensor]:
    """All kinds of tensors in a state dict, including one larger than a 1,024-byte bucket."""
    generator = torch.Generator().manual_seed(7)
    return [
        ("embed", torch.randn(40, 10, generator=generator)),  # 1,600 bytes
        ("norm", torch.tensor([0.5, -0.0, float("nan"), 3e38]).to(torch.bfloat16)),
        ("steps", torch.tensor(2**40 + 1)),
        ("empty", torch.empty(0, 8)),
        ("transposed", torch.randn(6, 8, generator=generator).t()),
        ("flags", torch.tensor([True, False, True])),
        ("ids", torch.arange(-3, 60, dtype=torch.int64)),
        ("head", torch.randn(12, 12, generator=generator).to(torch.bfloat16)),
    ]


def send_to(
    channel: "Channel", offer: WeightOffer, tensors: Sequence[NamedTensor]
) -> dict[int, Loaded]:
    """Runs a transfer that must succeed on all ranks. Returns what each rank loaded."""
    loaded = {rank: Loaded() for rank in range(1, offer.world_size)}
    expected = dict.fromkeys(loaded, tensors)
    outcomes = channel.transfer(
        offer, tensors, expected, {rank: each.load for rank, each in loaded.items()}
    )
    assert [type(outcomes[rank]) for rank in range(offer.world_size)] == (
        [TransferReport] * offer.world_size
    ), outcomes
    return loaded


def assert_arrived(loaded: Loaded, tensors: Sequence[NamedTensor]) -> None:
    assert set(loaded.tensors) == {name for name, _ in tensors}
    for name, tensor in tensors:
        assert same_bits(loaded.tensors[name], tensor), name


class Endpoints(Protocol):
    """A sender and a factory of receivers; the channel closes them at the end of the test."""

    @property
    def sender(self) -> WeightSender: ...

    @property
    def backend(self) -> WeightBackend: ...

    def make_receiver(self) -> WeightReceiver: ...


class TorchEndpoints:
    """Members on the given devices; by default on the CPU, with nccl on one GPU each."""

    def __init__(
        self,
        backend: WeightBackend,
        bucket_bytes: int,
        *,
        in_place: bool = False,
        devices: Sequence[str] = (),
    ) -> None:
        self.backend: WeightBackend = backend
        self._devices = iter(
            devices or [f"cuda:{i}" if backend == "nccl" else "cpu" for i in range(MAX_MEMBERS)]
        )
        self._in_place = in_place
        self.sender = TorchSender(
            host="127.0.0.1", bucket_bytes=bucket_bytes, device=self._next_device()
        )

    def make_receiver(self) -> TorchReceiver:
        return TorchReceiver(device=self._next_device(), in_place=self._in_place)

    def _next_device(self) -> torch.device:
        return torch.device(next(self._devices))


class MemoryEndpoints:
    backend: WeightBackend = "gloo"

    def __init__(self, bucket_bytes: int) -> None:
        self._store = MemoryStore()
        self.sender = MemorySender(self._store, bucket_bytes=bucket_bytes)

    def make_receiver(self) -> MemoryReceiver:
        return MemoryReceiver(self._store)


class Channel:
    """Runs transfers: the sender in this thread, each receiver in its own thread."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.sender = endpoints.sender
        self._backend: WeightBackend = endpoints.backend
        self._make_receiver = endpoints.make_receiver
        self.receivers: dict[int, WeightReceiver] = {}

    def receiver(self, index: int) -> WeightReceiver:
        if index not in self.receivers:
            self.receivers[index] = self._make_receiver()
        return self.receivers[index]

    def offer(
        self,
        policy_version: int,
        rank: int = 0,
        *,
        epoch: int = 1,
        world_size: int = 2,
        deadline_s: float = 10.0,
    ) -> WeightOffer:
        host, port = self.sender.store_address
        return WeightOffer(
            policy_version=policy_version,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            store_host=host,
            store_port=port,
            backend=self._backend,
            deadline_s=deadline_s,
        )

    def transfer(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        expected: dict[int, Sequence[NamedTensor]],
        load: dict[int, LoadTensors],
        canary: Canary | None = None,
    ) -> dict[int, Outcome]:
        """Runs one transfer to the ranks of `expected`. Returns the outcome by rank."""
        outcomes: dict[int, Outcome] = {}

        def receive(rank: int) -> None:
            theirs = replace(offer, rank=rank)
            receiver = self.receiver(rank)
            attempt(outcomes, rank, lambda: receiver.receive(theirs, expected[rank], load[rank]))

        threads = [threading.Thread(target=receive, args=(rank,)) for rank in expected]
        for thread in threads:
            thread.start()
        attempt(outcomes, 0, lambda: self.sender.send(offer, tensors, canary))
        for thread in threads:
            thread.join(JOIN_S)
            assert not thread.is_alive()
        return outcomes

    def close(self) -> None:
        for endpoint in (self.sender, *self.receivers.values()):
            endpoint.close()
            endpoint.close()


def attempt(outcomes: dict[int, Outcome], rank: int, call: Callable[[], TransferReport]) -> None:
    try:
        outcomes[rank] = call()
    except (SpeedAsyncError, LookupError) as error:
        outcomes[rank] = error


@contextmanager
def open_channel(endpoints: Endpoints) -> Iterator[Channel]:
    channel = Channel(endpoints)
    try:
        yield channel
    finally:
        channel.close()


def on_every_channel(*, bucket_bytes: int = 1024):
    """Parametrizes the test with a `channel` in memory and over each backend."""
    return pytest.mark.parametrize(
        "make_endpoints",
        [
            pytest.param(lambda: MemoryEndpoints(bucket_bytes), id="memory"),
            pytest.param(lambda: TorchEndpoints("gloo", bucket_bytes), id="gloo"),
            pytest.param(lambda: TorchEndpoints("ipc", bucket_bytes), id="ipc"),
            pytest.param(
                lambda: TorchEndpoints("nccl", bucket_bytes),
                id="nccl",
                marks=[pytest.mark.gpu, NEEDS_GPUS],
            ),
        ],
    )


@pytest.fixture
def channel(make_endpoints: Callable[[], Endpoints]) -> Iterator[Channel]:
    with open_channel(make_endpoints()) as opened:
        yield opened


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN equals itself, and -0.0 is not 0.0."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs))
    return torch.equal(*flat)
