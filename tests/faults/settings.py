"""Settings of a drill: its plan, and the configuration of its run."""

from dataclasses import dataclass
from pathlib import Path

from tests.fakes.paths import MODEL
from tests.faults.faults import Fault

DISK_BYTES = 256 * 1024 * 1024
PEER_TIMEOUT_S = 8.0
"""Longer than a connection may take to be restored: a handshake (5 s) and a pause before the next
one (1 s). Otherwise a busy machine loses actors to a fault of the service."""
WEIGHTS_DEADLINE_S = 3.0
GROUPS_PER_UPDATE = 16
ENDLESS = 1_000_000
"""Number of updates: a drill stops its run after the faults, and resumes it for the last ones."""

CONFIG = """
algorithm = "speed-rloo"
[run]
folder = "{run_folder}"
seed = {seed}
updates = {updates}
[model]
path = "{model}"
[task]
name = "scripted"
num_prompts = 4096
num_held_out = 8
[gate]
n_init = 2
n_cont = 2
[actors]
engine = "scripted"
slots = 8
max_new_tokens = 4
max_restarts = 999
[buffer]
credits = {credits}
capacity_groups = 1000000
max_staleness = 1000000
[learner]
groups_per_update = {groups_per_update}
checkpoint_every = 10
[evaluate]
every = 0
[weights]
deadline_s = {weights_deadline_s}
[cluster]
actors = {num_actors}
service_port = {service_port}
advertised_port = {advertised_port}
feed_port = {feed_port}
peer_timeout_s = {peer_timeout_s}
stall_timeout_s = 120
connect_timeout_s = 60
drain_timeout_s = 10
max_restarts = 100000
[observe]
trace = "{trace_folder}"
"""
"""No group becomes stale or is evicted: every accepted group is trained, or left at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    faults: list[Fault]
    seed: int
    num_actors: int = 2
    groups_per_update: int = GROUPS_PER_UPDATE


def write_config(
    path: Path,
    plan: Plan,
    *,
    run_folder: Path,
    trace_folder: Path,
    service_port: int,
    advertised_port: int,
    feed_port: int,
) -> None:
    path.write_text(
        CONFIG.format(
            run_folder=run_folder,
            seed=plan.seed,
            updates=ENDLESS,
            model=MODEL,
            credits=4 * plan.groups_per_update,
            groups_per_update=plan.groups_per_update,
            weights_deadline_s=WEIGHTS_DEADLINE_S,
            num_actors=plan.num_actors,
            service_port=service_port,
            advertised_port=advertised_port,
            feed_port=feed_port,
            peer_timeout_s=PEER_TIMEOUT_S,
            trace_folder=trace_folder,
        )
    )
