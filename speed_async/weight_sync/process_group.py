"""torch.distributed groups created without `init_process_group`, their store, and the transfer of
buckets through them.

Shape legend: B bytes of one bucket.
"""

import re
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store, TCPStore

from speed_async.errors import ConfigError, WeightSyncError
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.buckets import NUM_BUFFERS, Bucket, largest_bytes
from speed_async.weight_sync.nccl import HasLeft, await_work, make_nccl_group, start_broadcast
from speed_async.weight_sync.network_device import own_address

MAX_ERROR_LENGTH = 200
CLOSED = re.compile(r"closed by peer|reset by peer|Broken pipe", re.IGNORECASE)
CPP_LOCATION = re.compile(r"\[\S+\.(?:cc|cpp|cu|h|hpp):\d+\]")
"""Source location in a C++ error: `[/__w/.../pair.cc:553]`."""
MIN_POLL_S, MAX_POLL_S = 1e-4, 0.05


def choose_backend(
    configured: str,
    learner_device: torch.device,
    *,
    actor_gpus: Sequence[Sequence[int]],
    one_machine: bool = True,
    actors_device: str = "auto",
) -> WeightBackend:
    """Backend of all epochs of a run.

    `actor_gpus`: GPUs that each actor on the learner's machine can see, numbered as in the learner.
    `one_machine`: whether these are all actors. Devices of other machines are not known here.
    "auto" selects nccl when every rank has its own GPU (NCCL does not support two ranks on one
    GPU), ipc when every actor sees the learner's GPU, and gloo otherwise. On a CPU, ipc is faster
    (docs/benchmarks.md) but excludes late joiners on other machines.
    Raises ConfigError when nccl or ipc is configured and not possible.
    """
    on_gpu = learner_device.type == "cuda" and actors_device != "cpu"
    used = [learner_device.index, *(gpu for gpus in actor_gpus for gpu in gpus)]
    own_gpus = on_gpu and all(actor_gpus) and len(set(used)) == len(used)
    sees_learner = one_machine and all(learner_device.index in gpus for gpus in actor_gpus)
    match configured:
        case "nccl" | "auto" if own_gpus:
            return "nccl"
        case "auto" if on_gpu and sees_learner:
            return "ipc"
        case "auto" | "gloo":
            return "gloo"
        case "nccl":
            shown = "; ".join(", ".join(map(str, gpus)) or "none" for gpus in actor_gpus)
            remedy = (
                f"requires a GPU for each rank, but the learner runs on '{learner_device}' and the "
                f"actors of its machine have GPUs [{shown}] with actors.device = "
                f"'{actors_device}'; use 'auto'"
            )
        case "ipc" if not sys.platform.startswith("linux"):
            remedy = f"requires Linux, and this is '{sys.platform}'; use 'auto'"
        case "ipc" if not one_machine:
            remedy = "requires all ranks on one machine, and this run has several nodes; use 'auto'"
        case "ipc" if learner_device.type == "cuda" and actors_device == "cpu":
            remedy = "cannot share GPU memory with actors.device = 'cpu'; use 'auto'"
        case "ipc" if on_gpu and not sees_learner:
            remedy = (
                f"requires that every actor sees the learner's GPU ('{learner_device}'), but each "
                "actor sees only GPUs of its own; use 'auto'"
            )
        case "ipc":
            return "ipc"
        case _:
            remedy = "use 'auto', 'gloo', 'nccl' or 'ipc'"
    raise ConfigError("weights.backend", configured, remedy)


def host_store(host: str, timeout_s: float) -> TCPStore:
    """A store served by this process at a free port of `host`, on this interface only.

    Raises WeightSyncError when `host` is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(address[0]), 0), family=family, backlog=1024)
    except OSError as error:
        raise WeightSyncError(
            f"cannot serve the weight store at '{host}' ({error}): set cluster.host to an address"
            " of the learner's machine"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reach_store(offer: WeightOffer) -> TCPStore:
    """A receiver's connection to the sender's store. Raises RuntimeError at the deadline."""
    return TCPStore(
        offer.store_host,
        offer.store_port,
        is_master=False,
        timeout=timedelta(seconds=offer.deadline_s),
        wait_for_workers=False,
    )


def describe_error(error: BaseException) -> str:
    """First line of a backend's error message, without C++ source locations."""
    text = str(error).partition("\n")[0]
    if CLOSED.search(text):
        return "the connection was closed by the peer"
    text = CPP_LOCATION.sub("", text).strip()
    return text[:MAX_ERROR_LENGTH] or type(error).__name__


def await_keys(
    store: Store, keys: Mapping[int, str], timeout_s: float, lost: Collection[int]
) -> list[int]:
    """Waits until all keys are set. Returns the ranks without a key at the timeout, or those of
    them that are `lost` as soon as there are any. Raises RuntimeError when the store is
    unreachable.

    It polls, with a delay of at most a tenth, because a wait of the store cannot be interrupted.
    """
    started_s = time.monotonic()
    while not store.check([*keys.values()]):
        waited_s = time.monotonic() - started_s
        candidates = keys if waited_s >= timeout_s else keys.keys() & set(lost)
        if missing := [rank for rank in candidates if not store.check([keys[rank]])]:
            return sorted(missing)
        time.sleep(min(max(waited_s / 10, MIN_POLL_S), MAX_POLL_S))
    return []


class MemberLeft(RuntimeError):
    """These ranks did not respond within the deadline, or are lost."""

    def __init__(self, ranks: Sequence[int], absence: str) -> None:
        super().__init__(f"{name_ranks(ranks)} {absence}")
        self.ranks = tuple(ranks)


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def make_group(store: Store, offer: WeightOffer, device: torch.device, has_left: HasLeft) -> Any:
    """Process group of all ranks of the offer; blocks until all have joined or the deadline passes.

    Raises RuntimeError, as torch.distributed does.
    """
    if offer.backend == "nccl":
        return make_nccl_group(store, offer, device, has_left)
    # Gloo's default interface is that of the machine's host name, which other nodes often cannot
    # reach. The interface on the route to the store is reachable.
    gloo: Any = ProcessGroupGloo  # its options are missing from the stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=own_address(offer.store_host))]
    options._timeout = timedelta(seconds=offer.deadline_s)
    return gloo(store, offer.rank, offer.world_size, options)


class GroupTransport:
    """Broadcasts buckets over a process group. Failures are RuntimeErrors.

    A receiver has its own buffers: a transfer that fails before its first bucket is complete must
    leave the old weights of the model intact.
    """

    def __init__(
        self, group: Any, offer: WeightOffer, device: torch.device, has_left: HasLeft
    ) -> None:
        self._group: Any = group
        self._has_left = has_left
        self._is_nccl = offer.backend == "nccl"
        self._device = device if self._is_nccl else torch.device("cpu")
        self._pinned = device.type == "cuda" and self._device.type == "cpu"
        self._buffers_B: list[Tensor] = []
        self._buckets: Sequence[Bucket] = ()
        self._works: list[Any] = []
        self._deadline_s = offer.deadline_s

    def begin_sending(self, buckets: Sequence[Bucket], deadline_s: float) -> object:
        """Sender: starts a transfer. Returns None, because it shares no memory."""
        self._begin(buckets, deadline_s)
        return None

    def begin_receiving(self, buckets: Sequence[Bucket], deadline_s: float, memory: object) -> None:
        """Receiver: starts a transfer. `memory` is None."""
        self._begin(buckets, deadline_s)

    def _begin(self, buckets: Sequence[Bucket], deadline_s: float) -> None:
        self._buckets, self._works, self._deadline_s = buckets, [], deadline_s
        num_bytes = largest_bytes(buckets)
        if not self._buffers_B or self._buffers_B[0].numel() < num_bytes:
            self._buffers_B = [
                torch.empty(
                    num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned
                )
                for _ in range(NUM_BUFFERS)
            ]

    def can_send(self, packed_B: Tensor) -> bool:
        """Whether `send` accepts this memory instead of the acquired buffer."""
        return packed_B.device == self._device

    def acquire(self, index: int) -> Tensor:
        """Sender: a buffer for this bucket, at least (B,) uint8; waits until one is free.

        Two broadcasts are therefore in flight, so that the network is never idle between them.
        """
        if index >= NUM_BUFFERS:
            self._await(index - NUM_BUFFERS)
        return self._buffers_B[index % NUM_BUFFERS]

    def send(self, index: int, packed_B: Tensor) -> None:
        """Sender: starts to send the next bucket, which must not change until `finish`."""
        self._works.append(self._broadcast(packed_B))

    def finish(self) -> None:
        """Sender: waits until every bucket was sent."""
        for index in range(len(self._works)):
            self._await(index)

    def take(self, index: int) -> Tensor:
        """Receiver: this bucket, at least (B,) uint8, valid until the next call."""
        for posted in range(len(self._works), min(index + NUM_BUFFERS, len(self._buckets))):
            buffer_B = self._buffers_B[posted % NUM_BUFFERS]
            self._works.append(self._broadcast(buffer_B[: self._buckets[posted].num_bytes]))
        self._await(index)
        return self._buffers_B[index % NUM_BUFFERS]

    def release(self) -> None:
        """Receiver: a no-op, because `take` posts the next receive."""

    def abort(self) -> None:
        """Frees the group, which closes its connections and wakes waiting peers."""
        group, self._group, self._works = self._group, None, []
        group.abort()

    def _broadcast(self, buffer_B: Tensor) -> Any:
        if self._is_nccl:
            return start_broadcast(self._group, buffer_B, self._deadline_s, self._has_left)
        return self._group.broadcast(buffer_B, 0, timedelta(seconds=self._deadline_s))

    def _await(self, index: int) -> None:
        if self._is_nccl:
            await_work(self._works[index], self._deadline_s, self._has_left)
        else:
            self._works[index].wait(timedelta(seconds=self._deadline_s))
