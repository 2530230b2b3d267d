"""NCCL process groups whose calls end at the offer's deadline.

To create a communicator, to start a broadcast and to abort may block for as long as a peer is
silent. Communicators are therefore non-blocking, and every such call runs in a daemon thread, which
is abandoned when it is late. torch's watchdog must not end this process meanwhile, so processes
start with `nccl_environment` (launcher/nccl_environment.py).
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import Store

from speed_async.errors import ConfigError
from speed_async.types import WeightOffer
from speed_async.weight_sync.device import gpu_uuid

T = TypeVar("T")
HasLeft = Callable[[], bool]
"""Whether the sender has left the group. NCCL does not always tell the other members."""

POLL_S = 0.0005
WATCH_S = 0.1
"""Time between two calls of `HasLeft`."""
WATCHDOG_FACTOR = 10
"""The timeout of torch's watchdog in deadlines: it must never expire first."""


def gpu_identity(device: torch.device) -> str:
    """The GPU of this member. Raises ConfigError if its device is not a GPU."""
    if device.type != "cuda":
        raise ConfigError(
            "weights.backend",
            "nccl",
            f"every actor needs a GPU, and this one on '{socket.gethostname()}' uses '{device}' "
            "('auto' selects nccl by the devices of the learner's node only): set weights.backend "
            "= 'gloo', or make a GPU available to this actor",
        )
    return gpu_uuid(device)


def gpu_conflicts(gpus: Mapping[int, str]) -> dict[int, str]:
    """`gpus`: by rank. Why members cannot take part, by rank: a lower rank has the same GPU. Actors
    that join have the highest ranks."""
    owners: dict[str, int] = {}
    found = {}
    for rank, gpu in sorted(gpus.items()):
        owner = owners.setdefault(gpu, rank)
        if owner != rank:
            found[rank] = (
                f"uses the GPU of rank {owner}, and backend 'nccl' needs one for each rank: set "
                "weights.backend = 'gloo', or start this actor where a GPU is free"
            )
    return found


def make_nccl_group(
    store: Store, offer: WeightOffer, device: torch.device, has_left: HasLeft
) -> Any:
    """Process group with a communicator of all ranks. `device` has an index.

    Raises RuntimeError at the deadline, after which the group is aborted.
    """
    from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

    torch.cuda.set_device(device)  # thread-local
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=WATCHDOG_FACTOR * offer.deadline_s)
    options.config.blocking = 0
    group: Any = ProcessGroupNCCL(store, offer.rank, offer.world_size, options)
    end_s = time.monotonic() + offer.deadline_s
    try:
        # The first operation creates the communicator: it belongs to the rendezvous.
        probe_1 = torch.zeros(1, device=device)
        first = start_broadcast(group, probe_1, offer.deadline_s, has_left)
        await_work(first, end_s - time.monotonic(), has_left)
    except BaseException:
        threading.Thread(target=group.abort, daemon=True).start()
        raise
    return group


def start_broadcast(
    group: Any, buffer_B: torch.Tensor, deadline_s: float, has_left: HasLeft
) -> Any:
    """Starts the broadcast of rank 0. Raises RuntimeError at the deadline."""

    def start() -> Any:
        return group.broadcast(buffer_B, 0, timedelta(seconds=WATCHDOG_FACTOR * deadline_s))

    return _within(start, deadline_s, has_left)


def await_work(work: Any, deadline_s: float, has_left: HasLeft) -> None:
    """Waits until the work is complete on the GPU. Raises RuntimeError at the deadline, and for an
    error of NCCL."""
    # NCCL's wait only orders streams; the caller requires a completed transfer.
    _poll(work.is_completed, deadline_s, has_left)
    # Raises the error of a failed work, and then also aborts the communicator.
    _within(lambda: work.wait(timedelta(seconds=deadline_s)), deadline_s, has_left)


def _within(call: Callable[[], T], deadline_s: float, has_left: HasLeft) -> T:
    future: Future[T] = Future()
    on_gpu = torch.cuda.is_available()
    stream = torch.cuda.stream(torch.cuda.current_stream()) if on_gpu else nullcontext()

    def run() -> None:
        try:
            with stream:  # NCCL waits for the stream of the thread that calls it
                future.set_result(call())
        except Exception as error:  # task boundary: the caller that waits handles the error
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    _poll(future.done, deadline_s, has_left)
    return future.result()


def _poll(is_done: Callable[[], bool], deadline_s: float, has_left: HasLeft) -> None:
    now_s = time.monotonic()
    end_s, watch_s = now_s + deadline_s, now_s + WATCH_S
    while not is_done():
        now_s = time.monotonic()
        if now_s > end_s:
            raise RuntimeError("no response within the deadline")
        if now_s > watch_s:
            if has_left():
                raise RuntimeError("the sender left the group")
            watch_s = now_s + WATCH_S
        time.sleep(POLL_S)
