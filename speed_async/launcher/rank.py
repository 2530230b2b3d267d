"""Ranks of a run, and the nodes that they run on."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.schema import Config
from speed_async.errors import ConfigError, SpeedAsyncError

_RANGE = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This rank, as its launcher set it in the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_on_first_node(self) -> bool:
        """Whether the learner and the service run on this machine."""
        return self.rank == self.local_rank

    @property
    def has_many_nodes(self) -> bool:
        return self.world_size > self.local_world_size

    @staticmethod
    def from_environment() -> "Rank":
        try:
            return Rank(
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ["LOCAL_RANK"]),
                local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            )
        except KeyError as missing:
            raise SpeedAsyncError(
                f"environment variable {missing} is not set: start this module with torchrun "
                "(torchrun --nproc-per-node 3 -m speed_async.launch CONFIG), "
                "or use `speed-async train CONFIG`"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of a run; all nodes have the same number of ranks."""

    num_ranks: int
    index: int = 0
    num_nodes: int = 1

    def rank(self, local: int) -> Rank:
        return Rank(
            rank=self.index * self.num_ranks + local,
            world_size=self.num_nodes * self.num_ranks,
            local_rank=local,
            local_world_size=self.num_ranks,
        )


def node_of(config: Config, *, num_nodes: int, index: int, num_ranks: int | None) -> Node:
    """Build the node from the options of `speed-async train`. Raises SpeedAsyncError."""
    if index >= num_nodes:
        raise SpeedAsyncError(
            f"--node-rank {index}: nodes are numbered from 0 to {num_nodes - 1} with --nnodes "
            f"{num_nodes}"
        )
    if num_ranks is None:
        world_size = config.cluster.learners + config.cluster.actors
        num_ranks, rest = divmod(world_size, num_nodes)
        if rest:
            raise ConfigError(
                "cluster.actors",
                config.cluster.actors,
                f"{world_size} ranks cannot be divided evenly among --nnodes {num_nodes}; set "
                "--nproc-per-node",
            )
    return Node(num_ranks=num_ranks, index=index, num_nodes=num_nodes)


def check_world(config: Config, rank: Rank) -> None:
    """Raise ConfigError when the configuration does not fit this number of ranks and nodes."""
    cluster = config.cluster
    if rank.world_size <= cluster.learners:
        raise ConfigError(
            "cluster.learners",
            cluster.learners,
            f"leaves no rank for an actor among {rank.world_size}; start at least "
            f"{cluster.learners + 1} processes (--nproc-per-node)",
        )
    if not rank.has_many_nodes:
        return
    if cluster.learners > rank.local_world_size and not cluster.learner_port:
        raise ConfigError(
            "cluster.learner_port",
            0,
            "this run has learners on several nodes, which need to know the port of the first one; "
            "set one that is free on the node of rank 0, the same on every node",
        )
    if cluster.is_loopback:
        raise ConfigError(
            "cluster.host",
            cluster.host,
            "this run has several nodes, and actors on other nodes cannot reach a loopback "
            "address; set the address of the node of rank 0",
        )
    if not (cluster.advertised_port or cluster.service_port):
        raise ConfigError(
            "cluster.service_port",
            0,
            "this run has several nodes, and actors on other nodes need to know the service's "
            "port; set one that is free on the node of rank 0, the same on every node "
            "(--cluster.service_port 29411)",
        )


def reject_elastic() -> None:
    """Raise SpeedAsyncError when torchrun may change the number of nodes during the run.

    torchrun does not expose the range to its ranks; it is read from its command line or PET_NNODES.
    """
    nnodes = os.environ.get("PET_NNODES", "")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nnodes = _nnodes_option(_command_of(os.getppid())) or nnodes
    found = _RANGE.fullmatch(nnodes)
    if found and found[1] != found[2]:
        raise SpeedAsyncError(
            f"--nnodes {nnodes}: the number of nodes of a run cannot change while it runs; give "
            "torchrun one number, and add machines later with `speed-async actor --join`"
        )


def _nnodes_option(command: list[str]) -> str:
    """Value of torchrun's --nnodes, which may be abbreviated; empty if it is not given."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if len(name) > len("--n") and "--nnodes".startswith(name):
            return value if equals else following
        if argument == "speed_async.launch":
            break  # the remaining arguments belong to this package
    return ""


def _command_of(process_id: int) -> list[str]:
    """Arguments of a process's command line; empty if they cannot be read."""
    try:
        line = Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return []
    return [argument.decode(errors="replace") for argument in line.split(b"\0")[:-1]]
