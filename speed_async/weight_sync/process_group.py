"""torch.distributed groups created without `init_process_group`, and their rendezvous store."""

import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store, TCPStore

from speed_async.errors import ConfigError, WeightSyncError
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.ipc_group import host_ipc, join_ipc

NUM_IN_FLIGHT = 2
NCCL_POLL_S = 0.0005
NCCL_WATCHDOG_FACTOR = 10
"""The NCCL watchdog kills the process at its timeout, which must therefore never expire first."""


def choose_backend(
    configured: str,
    learner_device: str,
    *,
    num_visible_gpus: int,
    num_local_ranks: int = 2,
    num_ranks: int | None = None,
    actors_device: str = "auto",
) -> WeightBackend:
    """Backend of all epochs of a run. `num_ranks` None means that all ranks are local.

    "auto" selects nccl when every local rank can have its own GPU (NCCL does not support two ranks
    on one GPU), ipc when the learner and the actors share GPUs of one machine, and gloo otherwise.
    On a CPU, ipc is faster (docs/benchmarks.md) but excludes late joiners on other machines.
    Raises ConfigError when nccl or ipc is configured and not possible.
    """
    own_gpus = learner_device.startswith("cuda") and num_visible_gpus >= num_local_ranks
    one_machine = num_ranks is None or num_ranks == num_local_ranks
    match configured:
        case "auto" if own_gpus:
            return "nccl"
        case "auto" if learner_device.startswith("cuda") and one_machine and actors_device != "cpu":
            return "ipc"
        case "auto" | "gloo":
            return "gloo"
        case "nccl" if own_gpus:
            return "nccl"
        case "nccl":
            raise ConfigError(
                "weights.backend",
                configured,
                f"requires a GPU for each of {num_local_ranks} ranks, but the learner runs on"
                f" '{learner_device}' and {num_visible_gpus} GPUs are visible; use 'auto'",
            )
        case "ipc":
            return _check_ipc(learner_device, one_machine=one_machine, actors_device=actors_device)
        case _:
            raise ConfigError("weights.backend", configured, "use 'auto', 'gloo', 'nccl' or 'ipc'")


def _check_ipc(learner_device: str, *, one_machine: bool, actors_device: str) -> WeightBackend:
    if not sys.platform.startswith("linux"):
        remedy = f"requires Linux, and this is '{sys.platform}'; use 'auto'"
    elif not one_machine:
        remedy = "requires all ranks on one machine, and this run has several nodes; use 'auto'"
    elif learner_device.startswith("cuda") and actors_device == "cpu":
        remedy = "cannot share GPU memory with actors.device = 'cpu'; use 'auto'"
    else:
        return "ipc"
    raise ConfigError("weights.backend", "ipc", remedy)


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


def make_group(store: Store, offer: WeightOffer, device: torch.device) -> Any:
    """Process group of all ranks of the offer; blocks until all have joined or the deadline passes.

    Raises RuntimeError, as torch.distributed does.
    """
    if offer.backend == "nccl":
        return _nccl_group(store, offer, device)
    if offer.backend == "ipc":
        return join_ipc(store, offer) if offer.rank else host_ipc(store, offer)
    # Gloo's default interface is that of the machine's host name, which other nodes often cannot
    # reach. The interface on the route to the store is reachable.
    gloo: Any = ProcessGroupGloo  # its options are missing from the stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=_own_address(offer))]
    options._timeout = timedelta(seconds=offer.deadline_s)
    return gloo(store, offer.rank, offer.world_size, options)


def broadcast_from_sender(
    group: Any,
    buffers_B: Sequence[Tensor],
    deadline_s: float,
    backend: str,
    on_done: Callable[[int], None] = lambda _: None,
) -> None:
    """Sends from rank 0, or receives into `buffers_B`, (B,) uint8 each; blocks until all are done.

    Two broadcasts are in flight at a time, so that the network is never idle between them.
    `on_done` is called with the index of each buffer, in order, when its transfer completes.
    Raises RuntimeError when a member is lost or the deadline of a buffer passes.
    """
    if backend == "ipc":
        for index, buffer_B in enumerate(buffers_B):
            group.broadcast(buffer_B, deadline_s)
            on_done(index)
        return
    timeout = timedelta(seconds=deadline_s)
    works: list[Any] = []
    for index in range(len(buffers_B)):
        for buffer_B in buffers_B[len(works) : index + NUM_IN_FLIGHT]:
            works.append(group.broadcast(buffer_B, 0, timeout))
        _await_work(works[index], deadline_s, backend)
        on_done(index)


def _await_work(work: Any, deadline_s: float, backend: str) -> None:
    if backend == "nccl":
        # NCCL's wait only orders streams; the caller requires a completed transfer.
        end_s = time.monotonic() + deadline_s
        while not work.is_completed():
            if time.monotonic() > end_s:
                raise RuntimeError("Operation timed out!")
            time.sleep(NCCL_POLL_S)
    work.wait(timedelta(seconds=deadline_s))


def _nccl_group(store: Store, offer: WeightOffer, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

    torch.cuda.set_device(device)  # thread-local; this is the thread of the group
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=NCCL_WATCHDOG_FACTOR * offer.deadline_s)
    return ProcessGroupNCCL(store, offer.rank, offer.world_size, options)


def _own_address(offer: WeightOffer) -> str:
    """This machine's address on the route to the store (no packet is sent)."""
    family, kind, _, _, address = socket.getaddrinfo(
        offer.store_host, offer.store_port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
