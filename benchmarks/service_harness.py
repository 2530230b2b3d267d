"""The buffer service in a separate process, and processes with its simulated peers."""

import json
import multiprocessing
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import zmq

from benchmarks.harness import QUICKSTART, ROOT
from benchmarks.service_peers import (
    GROUP_SIZE,
    GROUPS_A_BATCH,
    TASK,
    Peer,
    SimulatedActor,
    SimulatedLearner,
    make_group,
)
from speed_async.config.load import build_config, save_config
from speed_async.config.schema import Config
from speed_async.transport.curve import ClientKeys

CREDITS = 64
WINDOW = 48
START_S = 60.0
FOREVER = 10**9

SPAWN = multiprocessing.get_context("spawn")
Work = tuple[Callable, tuple]


def service_config(
    *,
    durability: str,
    credits: int = CREDITS,
    capacity_groups: int = 1024,
    group_size: int = GROUP_SIZE,
    key_folder: Path | None = None,
) -> Config:
    """A run without gate, staleness limit or end, so that only the service limits the speed."""
    cluster: dict[str, object] = {"stall_timeout_s": float(FOREVER), "actors": 1}
    if key_folder is not None:
        cluster |= {"security": "curve", "keys": str(key_folder)}
    tree: dict[str, dict[str, object]] = {
        "run": {"updates": FOREVER},
        "model": {"path": str(QUICKSTART.parent / "model"), "context_length": 1 << 20},
        "actors": {"max_new_tokens": 1 << 16},
        "task": TASK,
        "gate": {"mode": "off", "n_init": group_size, "n_cont": 0},
        "learner": {"groups_per_update": GROUPS_A_BATCH},
        "buffer": {
            "capacity_groups": capacity_groups,
            "capacity_bytes": 8 * 1024**3,
            "credits": credits,
            "max_staleness": FOREVER,
            "durability": durability,
        },
        "evaluate": {"every": 0},
        "cluster": cluster,
        "observe": {"status_interval_s": 0.5},
    }
    return build_config({"algorithm": "rloo", **tree})


@dataclass(frozen=True, kw_only=True)
class Running:
    process_id: int
    port: int
    feed_port: int
    run_folder: Path


@contextmanager
def service(config: Config) -> Iterator[Running]:
    """Run the buffer service as in a run, with a run folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        saved = Path(folder) / "config.json"
        save_config(config, saved)
        command = [sys.executable, "-m", "speed_async.launcher.child", "service"]
        command += ["--parent", str(os.getpid()), "--run-folder", folder, "--config", str(saved)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                raise RuntimeError("the service did not start")
            yield Running(process_id=process.pid, run_folder=Path(folder), **json.loads(line))
        finally:
            process.kill()
            process.wait()


@contextmanager
def running_processes(*works: Work) -> Iterator[list[int]]:
    """Start a process per work item and yield their ids; kill them on exit."""
    processes = [SPAWN.Process(target=work, args=args, daemon=True) for work, args in works]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_actor(port: int, tokens_each: int, keys: ClientKeys | None) -> None:
    """Send groups as fast as they are acknowledged."""
    peer = Peer(zmq.Context(), port, "actor-1.0", keys)
    actor = SimulatedActor(peer, 1, make_group(tokens_each), WINDOW)
    while True:
        while actor.may_send:
            actor.send_one()
        message = peer.receive(1.0)
        if message is not None:
            actor.take(message)


def run_learner(
    port: int, num_groups: "Synchronized[int]", keys: ClientKeys | None, checkpoints: bool
) -> None:
    """Take batches as fast as they come; `num_groups` counts their groups."""
    learner = SimulatedLearner(Peer(zmq.Context(), port, "learner", keys), checkpoints=checkpoints)
    while True:
        learner.receive(1.0)
        num_groups.value = learner.num_groups
