"""A thousand actors on one service: acknowledgement latencies, and actors without leases.

1,024 simulated actors, each with its own connection, in four processes. Each holds leases, sends a
heartbeat twice per second, and sends groups of 8 completions on its own schedule, so that 2,000
completions of 1,024 tokens arrive every second in total, whether or not earlier ones were
acknowledged. A learner takes batches as fast as they come. The journal is written (batched).

Latency is measured from the time at which a group was due, so that a delay of the actor itself
counts against the result.

Usage: python -m benchmarks.service_scale [--actors 1024] [--rate 2000] [--seconds 60]
"""

import argparse
import asyncio
import resource
import select
import time
from multiprocessing.connection import Connection

import numpy as np
import psutil
import zmq

from benchmarks.harness import (
    SPAWN,
    RunningService,
    Work,
    make_group,
    report,
    running_processes,
    service,
    service_config,
)
from benchmarks.service_peers import PackedGroup, Peer, SimulatedActor, run_learner
from speed_async.errors import DeadlineExceeded
from speed_async.transport.feed import FeedSubscriber

NUM_PROCESSES = 4
COMPLETIONS_A_GROUP = 8
TOKENS = 1024
LEASES_EACH = 2
HEARTBEAT_S = 0.5
OPEN_FILES = 8192
"""One per connection, plus a reserve."""


def run_actors(
    port: int,
    indices: range,
    groups_per_s: float,
    starts_at_s: float,
    seconds: float,
    out: Connection,
) -> None:
    """Run many actors in one process, and send the result of `ActorPool.run`."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * len(indices) + 16)
    group = PackedGroup(make_group(TOKENS, COMPLETIONS_A_GROUP))
    epoll = select.epoll()
    actors: dict[int, SimulatedActor] = {}
    for index in indices:
        peer = Peer(context, port, f"actor-{index}.0", None)
        actors[peer.descriptor] = SimulatedActor(peer, index, group, LEASES_EACH)
        epoll.register(peer.descriptor, select.EPOLLIN)
    out.send(ActorPool(epoll, actors).run(groups_per_s, starts_at_s, seconds))
    time.sleep(600)  # stays connected until it is killed


class ActorPool:
    """Actors served in turn: each sends a group and a heartbeat when they are due."""

    def __init__(self, epoll: select.epoll, by_socket: dict[int, SimulatedActor]) -> None:
        self._actors = list(by_socket.values())
        self._epoll = epoll
        self._by_socket = by_socket

    def run(
        self, groups_per_s: float, starts_at_s: float, seconds: float
    ) -> tuple[list[float], list[int], list[int], int]:
        """Waits for acknowledgements (so far, if none came), leases and results per actor, and
        how often an actor without a lease was due."""
        num_due = num_idle = beats = 0
        between_beats_s = HEARTBEAT_S / len(self._actors)
        start_s = time.monotonic()
        while (now_s := time.monotonic()) < starts_at_s + seconds:
            for descriptor, _ in self._epoll.poll(0.002):
                self._read(self._by_socket[descriptor])
            while start_s + beats * between_beats_s < now_s:
                actor = self._actors[beats % len(self._actors)]
                beats += 1
                actor.report()
                self._read(actor)
            while (due_s := starts_at_s + num_due / groups_per_s) < now_s:
                actor = self._actors[num_due % len(self._actors)]
                num_due += 1
                if actor.has_work:
                    actor.send_one(due_s)
                    self._read(actor)
                else:
                    num_idle += 1
        now_s = time.monotonic()
        waits_s = [wait_s for actor in self._actors for wait_s in actor.peer.latencies_s]
        unacknowledged = [now_s - due_s for a in self._actors for _, due_s in a.peer.unacknowledged]
        leases = [actor.num_leases for actor in self._actors]
        return (
            waits_s + unacknowledged,
            leases,
            [actor.num_sent for actor in self._actors],
            num_idle,
        )

    def _read(self, actor: SimulatedActor) -> None:
        while (message := actor.peer.receive_now()) is not None:
            actor.take(message)


async def watch(running: RunningService, seconds: float) -> list[float]:
    """Event-loop lags that the service reports, until the time is over."""
    feed = FeedSubscriber("127.0.0.1", running.feed_port)
    lags_s, deadline_s = [], time.monotonic() + seconds
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            event = await feed.receive(left_s)
        except DeadlineExceeded:
            break
        lags_s.append(float(event.values.get("loop_lag_s") or 0.0))
    await feed.close()
    return lags_s


def measure(num_actors: int, completions_per_s: float, seconds: float, connect_s: float) -> dict:
    config = service_config(
        durability="batched",
        credits=num_actors * 3 // 2,
        capacity_groups=4 * num_actors,
        group_size=COMPLETIONS_A_GROUP,
    )
    each = num_actors // NUM_PROCESSES
    groups_per_s = completions_per_s / COMPLETIONS_A_GROUP / NUM_PROCESSES
    with service(config) as running:
        num_groups = SPAWN.Value("Q", 0)
        starts_at_s = time.monotonic() + connect_s
        works: list[Work] = [(run_learner, (running.port, num_groups, None, True))]
        ends = []
        for first in range(1, num_actors + 1, each):
            end, other = SPAWN.Pipe()
            ends.append(end)
            indices = range(first, first + each)
            works.append(
                (run_actors, (running.port, indices, groups_per_s, starts_at_s, seconds, other))
            )
        with running_processes(*works):
            time.sleep(max(0.0, starts_at_s - time.monotonic()))
            service_process = psutil.Process(running.process_id)
            cpu_s = sum(service_process.cpu_times()[:2])
            lags_s = asyncio.run(watch(running, seconds))
            cpu_s = sum(service_process.cpu_times()[:2]) - cpu_s
            results = [end.recv() for end in ends if end.poll(30.0)]
    waits_ms = 1000 * np.concatenate([waits_s for waits_s, _, _, _ in results])
    leases = [count for _, counts, _, _ in results for count in counts]
    sent = [count for _, _, counts, _ in results for count in counts]
    return {
        "actors": len(leases),
        "completions_per_s": COMPLETIONS_A_GROUP * len(waits_ms) / seconds,
        "due_without_lease": sum(num_idle for _, _, _, num_idle in results),
        "ack_p50_ms": float(np.quantile(waits_ms, 0.5)),
        "ack_p99_ms": float(np.quantile(waits_ms, 0.99)),
        "ack_max_ms": float(waits_ms.max()),
        "leases_each": f"{min(leases)} .. {max(leases)}",
        "results_each": f"{min(sent)} .. {max(sent)}",
        "loop_lag_p99_ms": 1000 * float(np.quantile(lags_s, 0.99)),
        "service_cpu": f"{100 * cpu_s / seconds:.0f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--actors", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2000.0, help="completions per second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--connect", type=float, default=20.0, help="seconds before the first")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    row = measure(arguments.actors, arguments.rate, arguments.seconds, arguments.connect)
    report("service_scale", f"{arguments.actors:,} actors, {arguments.seconds:.0f} s", [row])


if __name__ == "__main__":
    main()
