"""Throughput of the complete service, relative to bare ZeroMQ or to Ray moving the same groups.

The service (a separate process, started as in a run) receives groups of 24 from an actor, decodes
and validates them, writes its journal, orders them, acknowledges them, and sends batches of 16 to a
learner, which reports them as trained.

Bare ZeroMQ is one ROUTER, one DEALER that sends groups and one that receives them, in plain
blocking loops. The router inspects nothing: it answers every group with a frame of the size of an
acknowledgement, forwards the group unchanged, and grants the sender 16 more credits when the
receiver has acknowledged 16 groups. Queue bounds, socket options and copying are those of the
project's sockets. Both move groups between the same three processes over loopback, with the same
number of groups in flight.

Arms alternate, so that machine load affects all alike. Each row is the median of its repeats, with
quartiles. `cpu us` is the processor time of the middle process per group, including ZeroMQ's own
threads.

With `--ray`, the baseline is Ray, as described in service_ray.py, and all arms are without CURVE.

Usage: python -m benchmarks.service [--repeats 5] [--seconds 3] [--tokens 256 4096 32768] [--plain]
       python -m benchmarks.service --ray /somewhere/bin/python
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import psutil
import zmq

from benchmarks.harness import (
    CREDITS,
    GROUP_SIZE,
    GROUPS_A_BATCH,
    SPAWN,
    make_group,
    output_of,
    report,
    running_processes,
    service,
    service_config,
)
from benchmarks.service_peers import (
    PackedGroup,
    client_socket,
    receive_frames,
    run_actor,
    run_learner,
)
from speed_async.transport.codec import MAX_MESSAGE_BYTES
from speed_async.transport.curve import ClientKeys, load_client_keys
from speed_async.transport.key_making import make_keys
from speed_async.transport.sockets import send_frames, set_common_options
from speed_async.transport.zeromq import QUEUED_MESSAGES

TOKENS = (256, 4096, 32_768)
WARM_UP_GROUPS = 32
WARM_UP_S = 1.0
DEADLINE_S = 120.0
TARGETS = {"bare": {"batched": 0.5, "none": 0.8}, "ray": {"batched": 5.0, "none": 5.0}}
"""Ratio to each baseline, by buffer.durability."""

HELLO, GO = b"h", b"g"
ACKNOWLEDGED, MORE_CREDITS = b"a" * 64, b"m" * 64
RECEIVER = "learner"


@dataclass(frozen=True, kw_only=True)
class Arm:
    tokens_each: int
    kind: str  # a baseline: "bare" | "ray"; or a value of buffer.durability
    curve: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    groups_per_s: float
    cpu_us: float | None
    """Processor time of the middle process per group; None for Ray, which has several."""


def measure(middle_process_id: int, num_groups: "Synchronized[int]", seconds: float) -> Measured:
    deadline_s = time.monotonic() + DEADLINE_S
    while num_groups.value < WARM_UP_GROUPS:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"only {num_groups.value} groups arrived in {DEADLINE_S:.0f} s")
        time.sleep(0.02)
    time.sleep(WARM_UP_S)
    middle = psutil.Process(middle_process_id)
    groups, cpu, start_s = num_groups.value, sum(middle.cpu_times()[:2]), time.perf_counter()
    time.sleep(seconds)
    while num_groups.value == groups and time.perf_counter() - start_s < DEADLINE_S:
        time.sleep(0.02)  # a window without any group measures nothing
    took_s = time.perf_counter() - start_s
    groups, cpu = num_groups.value - groups, sum(middle.cpu_times()[:2]) - cpu
    if groups == 0:
        raise RuntimeError(f"no group arrived in {took_s:.1f} s")
    return Measured(groups_per_s=groups / took_s, cpu_us=1e6 * cpu / groups)


def run_service(arm: Arm, key_folder: Path | None, seconds: float) -> Measured:
    config = service_config(durability=arm.kind, key_folder=key_folder)
    keys = load_client_keys(key_folder) if key_folder else None
    num_groups = SPAWN.Value("Q", 0)
    with service(config) as running:
        learner = (run_learner, (running.port, num_groups, keys, arm.kind != "none"))
        actor = (run_actor, (running.port, arm.tokens_each, keys))
        with running_processes(learner, actor):
            return measure(running.process_id, num_groups, seconds)


def run_bare(arm: Arm, seconds: float) -> Measured:
    num_groups, port = SPAWN.Value("Q", 0), SPAWN.Value("i", 0)
    server, keys = None, None
    if arm.curve:
        server, (public, secret) = zmq.curve_keypair(), zmq.curve_keypair()
        keys = ClientKeys(server_public=server[0], public=public, secret=secret)
    with running_processes((route, (port, server))) as [router]:
        while not port.value:
            time.sleep(0.01)
        sender = (send, (port.value, arm.tokens_each, keys))
        with running_processes(sender, (receive, (port.value, num_groups, keys))):
            return measure(router, num_groups, seconds)


def route(port: "Synchronized[int]", server: tuple[bytes, bytes] | None) -> None:
    """`server`: public and secret key of a CURVE server."""
    socket: zmq.Socket = zmq.Context().socket(zmq.ROUTER)
    socket.SNDHWM = socket.RCVHWM = QUEUED_MESSAGES
    socket.ROUTER_MANDATORY = 1
    set_common_options(socket, max_frame_bytes=MAX_MESSAGE_BYTES)
    if server is not None:
        socket.CURVE_SERVER = 1
        socket.CURVE_PUBLICKEY, socket.CURVE_SECRETKEY = server
    port.value = socket.bind_to_random_port("tcp://127.0.0.1")
    with suppress(zmq.ZMQError):  # the peers are closed: the measurement is over
        _forward(socket)


def _forward(socket: zmq.Socket) -> None:
    names = {socket.recv_multipart()[0], socket.recv_multipart()[0]}  # the hello of both
    (receiver,) = {name for name in names if name.startswith(f"{RECEIVER}/".encode())}
    (sender,) = names - {receiver}
    socket.send_multipart([sender, GO])
    while True:
        identity, *frames = socket.recv_multipart(copy=False)
        if identity.bytes == receiver:
            socket.send_multipart([sender, MORE_CREDITS])
            continue
        socket.send_multipart([sender, ACKNOWLEDGED])
        send_frames(socket, [receiver, *[frame.buffer for frame in frames]])


def send(port: int, tokens_each: int, keys: ClientKeys | None) -> None:
    socket = client_socket(zmq.Context(), port, "actor-1.0", keys)
    frames = PackedGroup(make_group(tokens_each)).frames({})
    socket.send(HELLO)
    assert socket.recv() == GO
    available = CREDITS
    while True:
        while available > 0:
            send_frames(socket, frames)
            available -= 1
        if socket.recv() == MORE_CREDITS:
            available += GROUPS_A_BATCH


def receive(port: int, num_groups: "Synchronized[int]", keys: ClientKeys | None) -> None:
    socket = client_socket(zmq.Context(), port, RECEIVER, keys)
    socket.send(HELLO)
    while True:
        receive_frames(socket)
        num_groups.value += 1
        if num_groups.value % GROUPS_A_BATCH == 0:
            socket.send(ACKNOWLEDGED)


def run_ray(python: str, tokens_each: int, seconds: float) -> Measured:
    """Raises RuntimeError if this Python has no Ray."""
    command = [python, "benchmarks/service_ray.py", "--tokens", tokens_each, "--seconds", seconds]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    printed = json.loads(output_of([*map(str, command)], environment).splitlines()[-1])
    return Measured(groups_per_s=printed["groups_per_s"], cpu_us=None)


def run_arm(arm: Arm, key_folder: Path | None, seconds: float, ray_python: str = "") -> Measured:
    match arm.kind:
        case "bare":
            return run_bare(arm, seconds)
        case "ray":
            return run_ray(ray_python, arm.tokens_each, seconds)
        case _:
            return run_service(arm, key_folder if arm.curve else None, seconds)


def row(arm: Arm, results: dict[Arm, list[Measured]], baseline: str) -> dict[str, object]:
    """Medians of the arm, and of its ratios to adjacent repeats of the baseline."""
    rates = [measured.groups_per_s for measured in results[arm]]
    others = [measured.groups_per_s for measured in results[replace(arm, kind=baseline)]]
    low, middle, high = np.quantile(np.divide(rates, others), [0.25, 0.5, 0.75])
    cpus_us = [measured.cpu_us for measured in results[arm] if measured.cpu_us is not None]
    rate = statistics.median(rates)
    return {
        "tokens": arm.tokens_each,
        "curve": "on" if arm.curve else "off",
        "arm": baseline if arm.kind == baseline else f"journal {arm.kind}",
        "cpu_us": statistics.median(cpus_us) if cpus_us else "",
        "groups_per_s": rate,
        "mb_per_s": 12e-6 * arm.tokens_each * GROUP_SIZE * rate,
        "ratio": float(middle),
        "quartiles": f"{low:.2f} .. {high:.2f}",
        "target": TARGETS[baseline].get(arm.kind, 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--plain", action="store_true", help="without CURVE")
    parser.add_argument("--ray", default="", help="a Python with Ray installed: the baseline")
    arguments = parser.parse_args()
    baseline = "ray" if arguments.ray else "bare"
    with tempfile.TemporaryDirectory() as folder:
        key_folder = Path(folder) / "keys"
        make_keys(key_folder)
        arms = [
            Arm(tokens_each=tokens, kind=kind, curve=curve)
            for tokens in arguments.tokens
            for curve in ((False,) if arguments.plain or arguments.ray else (False, True))
            for kind in (baseline, "none", "batched")
        ]
        results: dict[Arm, list[Measured]] = {arm: [] for arm in arms}
        for repeat in range(arguments.repeats):
            for arm in arms:
                measured = run_arm(arm, key_folder, arguments.seconds, arguments.ray)
                results[arm].append(measured)
            title = f"The service relative to {baseline}; medians of {repeat + 1} repeats"
            name = "service_against_ray" if arguments.ray else "service"
            report(name, title, [row(arm, results, baseline) for arm in arms])


if __name__ == "__main__":
    main()
