"""An actor rank: finds the service, then supervises the actor as its child process.

consumes   the rendezvous record (on the learner's node) or the configuration (on other nodes),
           the service's reply, the metrics feed
ends       with the run; with its launcher; with RunLost when the service of another node is silent
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from speed_async.config.load import save_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, RoleError, RunFinished, RunLost, SpeedAsyncError
from speed_async.launcher.event_loop import stop_event
from speed_async.launcher.exit_status import remote_end_line
from speed_async.launcher.gpus import actor_gpus, visible_gpus
from speed_async.launcher.logs import log_to
from speed_async.launcher.preflight.shared_gpu import with_shared_memory
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import FOLDER_VARIABLE, node_rendezvous
from speed_async.launcher.roles.engine_environment import engine_environment, num_gpus
from speed_async.launcher.roles.join import Admitted, RunEnd, request_admission, wait_for_run_end
from speed_async.launcher.roles.joiner import localized
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import RunFolder
from speed_async.launcher.standard_streams import write_stream
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.feed import FeedSubscriber


async def supervise_rank(config: Config, rank: Rank) -> None:
    """Run this rank's actor until it exits. Raises RunLost, or RoleError with its message."""
    stopping = stop_event()
    try:
        admitted = await request_admission(
            _address_lookup(config, rank),
            stopping=stopping,
            timeout_s=config.cluster.connect_timeout_s,
            keys=client_keys(config.cluster),
            rank=rank.rank,
        )
    except RunFinished:
        return
    if admitted is None:
        return
    try:
        end = await _run_actor(config, rank, admitted, stopping)
    except RunLost:
        raise
    except SpeedAsyncError as error:
        if not rank.is_on_first_node:  # on the first node the learner's launcher ends the run
            failure = m.Failure(role=f"actor-{rank.rank}", message=str(error))
            await admitted.link.send(failure)
        raise
    finally:
        await admitted.link.close()
    if end is not None and end.outcome == "failed":
        raise RoleError.from_text(end.reason)
    if end is None or rank.is_on_first_node:
        return
    if FOLDER_VARIABLE in os.environ:
        node_rendezvous().change(outcome=end.outcome, reason=end.reason)
    elif rank.local_rank == 0:  # torchrun does not report the outcome
        write_stream(remote_end_line(end.outcome))


def _address_lookup(config: Config, rank: Rank) -> Callable[[], tuple[str, int] | None]:
    """Return a function that looks up the address of the service; it returns None if unknown."""
    cluster = config.cluster
    if not rank.is_on_first_node:
        return lambda: (cluster.host, cluster.advertised_port or cluster.service_port)
    rendezvous = node_rendezvous()

    def look_up() -> tuple[str, int] | None:
        record = rendezvous.read()
        if record.nothing_to_do:
            raise RunFinished("the run is already finished")
        return (record.host, record.port) if record.port else None

    return look_up


async def _run_actor(
    config: Config, rank: Rank, admitted: Admitted, stopping: asyncio.Event
) -> RunEnd | None:
    cluster, accepted = config.cluster, admitted.accepted
    run_config = localized(
        accepted.config,
        model=None if rank.is_on_first_node else config.model.path,
        data=None if rank.is_on_first_node else config.task.path,
        run_folder=None,
        keys=Path(cluster.keys) if cluster.keys else None,
        sources=() if rank.is_on_first_node else config.task.sources,
    )
    resolved = await asyncio.to_thread(with_shared_memory, run_config, rank)
    folder, name = RunFolder(path=Path(resolved.run.folder)), f"actor-{rank.rank}"
    own_config = None
    # On other nodes the disk may not be shared, and local paths may differ.
    if not rank.is_on_first_node or resolved != run_config:
        own_config = folder.log(name).with_suffix(".config.json")
    try:
        log_to(folder.log(f"{name}-supervisor"))
        if own_config is not None:
            save_config(resolved, own_config)
    except OSError as error:
        raise ConfigError(
            "run.folder", resolved.run.folder, f"cannot be used on this node ({error.strerror})"
        ) from None
    plan = ActorPlan(
        index=rank.rank,
        host=admitted.host,
        port=admitted.port,
        folder=folder.path,
        config=own_config,
        first_incarnation=accepted.incarnation,
        environment=_own_gpus(config, rank) | engine_environment(config),
    )
    # On the learner's node the launcher stops this rank; elsewhere only a silent feed shows that
    # the run is lost.
    silence_s = cluster.stall_timeout_s if rank.is_on_first_node else cluster.peer_timeout_s
    feed = FeedSubscriber(admitted.host, accepted.feed_port, keys=client_keys(cluster))
    try:
        run_over = wait_for_run_end(feed, silence_s)
        return await supervise(
            resolved, plan, stopping=stopping, run_over=run_over, report=admitted.link.send
        )
    finally:
        await feed.close()


def _own_gpus(config: Config, rank: Rank) -> dict[str, str]:
    """Environment that hides all GPUs except the actor's own; empty without GPUs."""
    count = num_gpus()
    chosen = actor_gpus(config, rank, count)
    if not chosen:
        return {}
    visible = visible_gpus(count)
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[index % len(visible)] for index in chosen)}
