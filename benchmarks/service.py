"""Throughput of the complete service, relative to bare ZeroMQ moving the same frames.

The service (a separate process, started as in a run) receives groups of 24 from an actor, decodes
and validates them, writes its journal, orders them, acknowledges them, and sends batches of 16 to a
learner, which reports them as trained. Bare ZeroMQ is described in service_bare.py. Both move
groups between the same three processes over loopback, with the same number of groups in flight.

Arms alternate, so that machine load affects all alike. Each row is the median of its repeats, with
quartiles. `cpu us` is the processor time of the middle process per group, including ZeroMQ's own
threads.

Usage: python -m benchmarks.service [--repeats 5] [--seconds 3] [--tokens 256 4096 32768] [--plain]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import psutil
import zmq

from benchmarks import service_bare as bare
from benchmarks.harness import report
from benchmarks.service_harness import make_curve_keys, service, service_config
from benchmarks.service_peers import Keys, Peer
from benchmarks.service_roles import GROUP_SIZE, SimulatedActor, SimulatedLearner, make_group

TOKENS = (256, 4096, 32_768)
CREDITS = 64
WINDOW = 48
WARM_UP_GROUPS = 32
WARM_UP_S = 1.0
DEADLINE_S = 120.0
AIMS = {"batched": 0.5, "none": 0.8}

SPAWN = multiprocessing.get_context("spawn")
Work = tuple[Callable, tuple]


@dataclass(frozen=True, kw_only=True)
class Arm:
    tokens_each: int
    kind: str  # "bare" | a value of buffer.durability
    curve: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    groups_per_s: float
    cpu_us: float
    """Processor time of the middle process per group."""


def run_actor(port: int, tokens_each: int, keys: Keys | None) -> None:
    peer = Peer(zmq.Context(), port, "actor-1.0", keys)
    actor = SimulatedActor(peer, 1, make_group(tokens_each), WINDOW)
    while True:
        while actor.may_send:
            actor.send_one()
        message = peer.receive(1.0)
        if message is not None:
            actor.take(message)


def run_learner(
    port: int, num_groups: "Synchronized[int]", keys: Keys | None, journals: bool
) -> None:
    learner = SimulatedLearner(Peer(zmq.Context(), port, "learner", keys), journals=journals)
    while True:
        learner.receive(1.0)
        num_groups.value = learner.num_groups


def measure(middle_pid: int, num_groups: "Synchronized[int]", seconds: float) -> Measured:
    deadline_s = time.monotonic() + DEADLINE_S
    while num_groups.value < WARM_UP_GROUPS:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"only {num_groups.value} groups arrived in {DEADLINE_S:.0f} s")
        time.sleep(0.02)
    time.sleep(WARM_UP_S)
    middle = psutil.Process(middle_pid)
    groups, cpu, start_s = num_groups.value, sum(middle.cpu_times()[:2]), time.perf_counter()
    time.sleep(seconds)
    while num_groups.value == groups and time.perf_counter() - start_s < DEADLINE_S:
        time.sleep(0.02)  # a window without any group measures nothing
    took_s = time.perf_counter() - start_s
    groups, cpu = num_groups.value - groups, sum(middle.cpu_times()[:2]) - cpu
    if groups == 0:
        raise RuntimeError(f"no group arrived in {took_s:.1f} s")
    return Measured(groups_per_s=groups / took_s, cpu_us=1e6 * cpu / groups)


@contextmanager
def running_processes(*works: Work) -> Iterator[list[int]]:
    """Start a process per work item; kill them on exit."""
    processes = [SPAWN.Process(target=work, args=args, daemon=True) for work, args in works]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_bare(arm: Arm, keys: Keys | None, seconds: float) -> Measured:
    num_groups, port = SPAWN.Value("Q", 0), SPAWN.Value("i", 0)
    server = zmq.curve_keypair() if arm.curve else None
    if server is not None:
        public, secret = zmq.curve_keypair()
        keys = Keys(folder=Path(), server_public=server[0], public=public, secret=secret)
    else:
        keys = None
    with running_processes((bare.route, (port, server))) as [router]:
        while not port.value:
            time.sleep(0.01)
        sender = (bare.send, (port.value, arm.tokens_each, CREDITS, keys))
        with running_processes(sender, (bare.take, (port.value, num_groups, keys))):
            return measure(router, num_groups, seconds)


def run_service_arm(arm: Arm, keys: Keys | None, seconds: float) -> Measured:
    config = service_config(durability=arm.kind, credits=CREDITS, keys=keys)
    num_groups = SPAWN.Value("Q", 0)
    with service(config) as running:
        learner = (run_learner, (running.port, num_groups, keys, arm.kind != "none"))
        actor = (run_actor, (running.port, arm.tokens_each, keys))
        with running_processes(learner, actor):
            return measure(running.process.pid, num_groups, seconds)


def run_arm(arm: Arm, keys: Keys | None, seconds: float) -> Measured:
    work = run_bare if arm.kind == "bare" else run_service_arm
    return work(arm, keys if arm.curve else None, seconds)


def row(arm: Arm, results: dict[Arm, list[Measured]]) -> dict[str, object]:
    bare_arm = Arm(tokens_each=arm.tokens_each, kind="bare", curve=arm.curve)
    rates = [measured.groups_per_s for measured in results[arm]]
    pairs = zip(results[arm], results[bare_arm], strict=True)
    ratios = [mine.groups_per_s / theirs.groups_per_s for mine, theirs in pairs]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    megabytes = 12 * arm.tokens_each * GROUP_SIZE / 1e6
    return {
        "tokens": arm.tokens_each,
        "curve": "on" if arm.curve else "off",
        "what": arm.kind if arm.kind == "bare" else f"journal {arm.kind}",
        "groups_per_s": statistics.median(rates),
        "mb_per_s": megabytes * statistics.median(rates),
        "cpu_us": statistics.median(measured.cpu_us for measured in results[arm]),
        "ratio": float(middle),
        "quartiles": f"{low:.2f} .. {high:.2f}",
        "aim": AIMS.get(arm.kind, 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--plain", action="store_true", help="without CURVE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = None if arguments.plain else make_curve_keys(Path(folder) / "keys")
        arms = [
            Arm(tokens_each=tokens, kind=kind, curve=curve)
            for tokens in arguments.tokens
            for curve in ((False, True) if keys else (False,))
            for kind in ("bare", "none", "batched")
        ]
        results: dict[Arm, list[Measured]] = {arm: [] for arm in arms}
        for repeat in range(arguments.repeats):
            for arm in arms:
                results[arm].append(run_arm(arm, keys, arguments.seconds))
            title = f"The service relative to bare ZeroMQ; medians of {repeat + 1} repeats"
            report("service", title, [row(arm, results) for arm in arms])


if __name__ == "__main__":
    main()
