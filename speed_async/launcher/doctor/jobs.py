"""The jobs of the rank processes of one node, and what this node keeps open for them."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.suites import open_suites
from speed_async.environments.task import data_fingerprint
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.doctor.records import RankJob
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.rank import Node

LOCAL_HOST = "127.0.0.1"


class CannotListen(SpeedAsyncError):
    """The store of rank 0 cannot be served at its address."""


def store_port(config: Config | None, node: Node) -> int | None:
    """Port of the store; 0: a free one. None if other nodes could not find it."""
    if node.num_nodes == 1:
        return 0
    if config is None or config.cluster.is_loopback:
        return None
    # No run uses these ports while it is being prepared.
    return config.cluster.learner_port or config.cluster.service_port or None


@contextmanager
def prepared_jobs(
    config: Config | None, node: Node, *, port: int, timeout_s: float
) -> Iterator[tuple[list[RankJob], socket.socket | None]]:
    """The jobs of this node's ranks; on node 0 also the socket of the store and the shared file.

    Raises CannotListen.
    """
    host = config.cluster.host if config is not None else LOCAL_HOST
    leads = node.index == 0
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(host, port)) if leads else None
        folder = _shared_folder(config, node)
        file = stack.enter_context(_shared_file(folder)) if folder and leads else None
        first = node.rank(0)
        job = RankJob(
            rank=first.rank,
            world_size=first.world_size,
            local_rank=0,
            local_world_size=first.local_world_size,
            host=host,
            port=listener.getsockname()[1] if listener is not None else port,
            timeout_s=timeout_s,
            parent_id=os.getpid(),
        )
        leader = replace(
            job,
            listener=listener.fileno() if listener is not None else None,
            inputs=_inputs(config, node),
            shared_folder=folder,
            shared_file=file,
        )
        others = [
            replace(job, rank=node.rank(local).rank, local_rank=local)
            for local in range(1, node.num_ranks)
        ]
        yield [leader, *others], listener


def _listen(host: str, port: int) -> socket.socket:
    """Listens on this interface only, and here, so that no other process can take the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        remedy = "set cluster.host to an address of this machine"
        if port:
            remedy += ", and stop what uses the port, or set another cluster.learner_port"
        raise CannotListen(f"the ranks cannot meet at {host}:{port} ({error}): {remedy}") from None


def _inputs(config: Config | None, node: Node) -> dict[str, str]:
    """Digests of this node's model and data, if there are several nodes to compare.

    Inputs that cannot be read have errors of their own (run_checks), and no digest.
    """
    if config is None or node.num_nodes == 1:
        return {}
    inputs = {}
    with suppress(OSError, SpeedAsyncError):
        inputs["model"] = model_fingerprint(model_folder(config.model.path), config.model)
    with suppress(OSError, SpeedAsyncError):
        suites = open_suites(config.evaluate.suites)
        inputs["data"] = data_fingerprint(make_task(config.task), suites)
    return inputs


def _shared_folder(config: Config | None, node: Node) -> str | None:
    """The nearest existing parent of the run folder, if learners on several nodes share it."""
    if config is None or config.cluster.learners <= node.num_ranks:
        return None
    if node.index * node.num_ranks >= config.cluster.learners:
        return None  # only actors here
    folder = Path(config.run.folder).expanduser().resolve()
    return str(next(each for each in (folder, *folder.parents) if each.is_dir()))


@contextmanager
def _shared_file(folder: str) -> Iterator[str | None]:
    """Name of a temporary file in this folder; None if it cannot be written (see run_checks)."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(
                tempfile.NamedTemporaryFile(prefix=".speed-async-doctor-", dir=folder)
            )
        except OSError:
            yield None
        else:
            yield Path(file.name).name
