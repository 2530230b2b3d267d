"""Round trips, clock offsets and all-reduces of a process group.

Shape legend: N numbers of one tensor.
"""

import time
from datetime import timedelta
from typing import Any

import torch

from speed_async.launcher.doctor.records import ALL_REDUCE_BYTES, NCCL
from speed_async.weight_sync.nccl import await_work

NUM_ROUND_TRIPS = 10
NUM_ALL_REDUCES = 5
NS_PER_S = 1e9


def measure_round_trips(
    group: Any, rank: int, size: int, timeout_s: float
) -> tuple[float, float] | tuple[None, None]:
    """Shortest round trip to rank 0, and this rank's wall clock minus that of rank 0, in seconds.

    Rank 0 replies to one rank after the other, and measures nothing itself. The offset is exact to
    half of the round trip. Raises RuntimeError.
    """
    timeout = timedelta(seconds=timeout_s)
    clock_1 = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        for peer in range(1, size):
            for _ in range(NUM_ROUND_TRIPS):
                group.recv([clock_1], peer, 0).wait(timeout)
                clock_1[0] = time.time_ns()
                group.send([clock_1], peer, 0).wait(timeout)
        return None, None
    measured = []
    for _ in range(NUM_ROUND_TRIPS):
        sent_ns, began_s = time.time_ns(), time.perf_counter()
        group.send([clock_1], 0, 0).wait(timeout)
        group.recv([clock_1], 0, 0).wait(timeout)
        round_trip_s = time.perf_counter() - began_s
        middle_s = sent_ns / NS_PER_S + round_trip_s / 2
        measured.append((round_trip_s, middle_s - int(clock_1) / NS_PER_S))
    return min(measured)


def measure_backend(
    group: Any, backend: str, device: torch.device, *, rank: int, size: int, timeout_s: float
) -> float:
    """Duration of one all-reduce of ALL_REDUCE_BYTES. Raises RuntimeError, also for a wrong sum."""

    def all_reduce(values_N: torch.Tensor, count: int) -> None:
        for index in range(count):
            work = group.allreduce([values_N])
            if backend != NCCL:
                work.wait(timedelta(seconds=timeout_s))
            elif index == count - 1:  # the stream of the GPU orders them
                await_work(work, timeout_s, lambda: False)

    count_N = ALL_REDUCE_BYTES[backend] // 4
    values_N = torch.full((count_N,), float(rank + 1), device=device)
    all_reduce(values_N, 1)
    expected = size * (size + 1) / 2
    if not bool((values_N == expected).all()):
        raise RuntimeError(
            f"an all-reduce of {size} ranks returned other numbers than their sum {expected:g}"
        )
    values_N.zero_()  # sums of sums would overflow
    if backend == NCCL:
        torch.cuda.synchronize(device)
    began_s = time.perf_counter()
    all_reduce(values_N, NUM_ALL_REDUCES)
    return (time.perf_counter() - began_s) / NUM_ALL_REDUCES
