"""Time of the coordination around a weight transfer, by number of receivers.

Measures the store's part, with the calls of `speed_async/weight_sync/epoch_group.py`. At the
rendezvous every receiver registers and waits for the start signal. In every transfer it writes its
verdict on the manifest, and the sender collects the verdicts. Receivers are threads of four
processes on this machine, so they share its cores with the store. Connecting is timed separately:
torch resolves the name of every peer's address, and a name server that does not answer a burst of
such queries costs its timeout (5 s). Creating the process group and the broadcasts are not
included.

Usage: python -m benchmarks.rendezvous
"""

import multiprocessing
import statistics
import threading
import time
from multiprocessing.synchronize import Barrier

import numpy as np
from torch._C._distributed_c10d import Store

from benchmarks.harness import report
from speed_async.types import WeightOffer
from speed_async.weight_sync.process_group import await_keys, host_store, reach_store

NUM_RECEIVERS = (8, 16, 32, 64, 128)
NUM_PROCESSES = 4
NUM_REPEATS = 7
DEADLINE_S = 60.0


def receive(offer: WeightOffer, ranks: list[int], barrier: Barrier) -> None:
    """Run all receivers of one process, in lockstep with the sender."""
    threads = [
        threading.Thread(target=_one_receiver, args=(offer, rank, barrier)) for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one_receiver(offer: WeightOffer, rank: int, barrier: Barrier) -> None:
    for repeat in range(NUM_REPEATS):
        barrier.wait(DEADLINE_S)
        store = reach_store(offer)
        barrier.wait(DEADLINE_S)
        barrier.wait(DEADLINE_S)
        store.set(f"{repeat}/joined/{rank}", "")
        assert not await_keys(store, {0: f"{repeat}/go"}, DEADLINE_S, ())
        store.get(f"{repeat}/go")
        barrier.wait(DEADLINE_S)
        barrier.wait(DEADLINE_S)
        store.set(f"{repeat}/verdict/{rank}", "")


def gather(store: Store, num_receivers: int, barrier: Barrier) -> dict[str, list[float]]:
    """Seconds of every repeat: connecting, the rendezvous, the verdicts."""
    times_s: dict[str, list[float]] = {"connect": [], "rendezvous": [], "verdicts": []}
    for repeat in range(NUM_REPEATS):
        barrier.wait(DEADLINE_S)
        start_s = time.perf_counter()
        barrier.wait(DEADLINE_S)
        times_s["connect"].append(time.perf_counter() - start_s)
        barrier.wait(DEADLINE_S)
        start_s = time.perf_counter()
        _collect(store, [f"{repeat}/joined/{rank}" for rank in range(num_receivers)])
        store.set(f"{repeat}/go", "")
        barrier.wait(DEADLINE_S)
        times_s["rendezvous"].append(time.perf_counter() - start_s)
        barrier.wait(DEADLINE_S)
        start_s = time.perf_counter()
        keys = [f"{repeat}/verdict/{rank}" for rank in range(num_receivers)]
        _collect(store, keys)
        times_s["verdicts"].append(time.perf_counter() - start_s)
        for key in keys:
            store.delete_key(key)
    return times_s


def _collect(store: Store, keys: list[str]) -> None:
    assert not await_keys(store, dict(enumerate(keys)), DEADLINE_S, ())
    store.multi_get(keys)


def measure(num_receivers: int) -> dict[str, object]:
    store = host_store("127.0.0.1", DEADLINE_S)
    offer = WeightOffer(
        policy_version=1,
        epoch=1,
        rank=1,
        world_size=num_receivers + 1,
        store_host="127.0.0.1",
        store_port=store.port,
        backend="gloo",
        deadline_s=DEADLINE_S,
    )
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_receivers + 1)
    shares = [list(range(first, num_receivers, NUM_PROCESSES)) for first in range(NUM_PROCESSES)]
    peers = [
        context.Process(target=receive, args=(offer, ranks, barrier), daemon=True)
        for ranks in shares
    ]
    for peer in peers:
        peer.start()
    times_s = gather(store, num_receivers, barrier)
    for peer in peers:
        peer.join(DEADLINE_S)
    medians = {f"{what}_ms": 1000 * statistics.median(of) for what, of in times_s.items()}
    return {"receivers": num_receivers, **medians}


def main() -> None:
    rows = [measure(num_receivers) for num_receivers in NUM_RECEIVERS]
    for what in ("rendezvous_ms", "verdicts_ms"):
        slope, start = np.polyfit(NUM_RECEIVERS, [float(str(row[what])) for row in rows], 1)
        print(f"{what}: {start:.2f} + {slope:.3f} per receiver")
    report("rendezvous", f"The store's part of a transfer, medians of {NUM_REPEATS}", rows)


if __name__ == "__main__":
    main()
