"""A rank that is an actor: finds the service, then supervises the actor, its child.

consumes   the notice of its node (the learner's node) or the configuration (any other), the
           service's answer, the metrics feed
ends       with the run; with its launcher; with LostRun when another node's service falls silent
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import torch

from speed_async.config.load import save_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, LostRun, RoleError, RunFinished, SpeedAsyncError
from speed_async.launcher.event_loop import stop_event
from speed_async.launcher.exit_status import ended_elsewhere
from speed_async.launcher.logs import log_to
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import FOLDER_VARIABLE, node_rendezvous
from speed_async.launcher.roles.engine_choice import engine_environment
from speed_async.launcher.roles.join import Admitted, RunEnd, ask_for_place, until_end
from speed_async.launcher.roles.joiner import localized
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import RunFolder
from speed_async.launcher.standard_streams import tell
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.feed import FeedSubscriber


async def supervise_rank(config: Config, rank: Rank) -> None:
    """Run this rank's actor to its end. Raises RoleError with the actor's own words, LostRun."""
    stopping = stop_event()
    try:
        place = await ask_for_place(
            _where(config, rank),
            stopping=stopping,
            timeout_s=config.cluster.connect_timeout_s,
            keys=client_keys(config.cluster),
            rank=rank.rank,
        )
    except RunFinished:
        return
    if place is None:
        return
    try:
        end = await _take_part(config, rank, place, stopping)
    except LostRun:
        raise
    except SpeedAsyncError as error:
        if not rank.is_on_first_node:  # there the learner's launcher ends the run
            failure = m.Failure(role=f"actor-{rank.rank}", message=str(error))
            await place.link.send(failure)
        raise
    finally:
        await place.link.close()
    if end is not None and end.outcome == "failed":
        raise RoleError.quoting(end.reason)
    if end is None or rank.is_on_first_node:
        return
    if FOLDER_VARIABLE in os.environ:
        node_rendezvous().change(outcome=end.outcome, reason=end.reason)
    elif rank.local_rank == 0:  # torchrun says nothing
        tell(ended_elsewhere(end.outcome))


def _where(config: Config, rank: Rank) -> Callable[[], tuple[str, int] | None]:
    """Tells where the service listens, as far as this node knows."""
    cluster = config.cluster
    if not rank.is_on_first_node:
        return lambda: (cluster.host, cluster.advertised_port or cluster.service_port)
    file = node_rendezvous()

    def look() -> tuple[str, int] | None:
        notice = file.read()
        if notice.nothing_to_do:
            raise RunFinished("the run was finished before")
        return (notice.host, notice.port) if notice.port else None

    return look


async def _take_part(
    config: Config, rank: Rank, place: Admitted, stopping: asyncio.Event
) -> RunEnd | None:
    cluster, accepted = config.cluster, place.accepted
    resolved = localized(
        accepted.config,
        model=None if rank.is_on_first_node else Path(config.model.path),
        data=Path(config.task.path) if config.task.path and not rank.is_on_first_node else None,
        run_folder=None,
        keys=Path(cluster.keys) if cluster.keys else None,
    )
    folder, name = RunFolder(path=Path(resolved.run.folder)), f"actor-{rank.rank}"
    own_config = None if rank.is_on_first_node else folder.log(name).with_suffix(".config.json")
    try:
        log_to(folder.log(f"{name}-supervisor"))
        if own_config is not None:  # the disk may not be shared, and paths may be others here
            save_config(resolved, own_config)
    except OSError as error:
        raise ConfigError(
            "run.folder", resolved.run.folder, f"cannot be used on this node ({error.strerror})"
        ) from None
    plan = ActorPlan(
        index=rank.rank,
        host=place.host,
        port=place.port,
        folder=folder.path,
        config=own_config,
        first_incarnation=accepted.incarnation,
        environment=_own_gpus(config, rank) | engine_environment(config),
    )
    # On the learner's node its launcher ends this rank; elsewhere silence is all that tells.
    silence_s = cluster.stall_timeout_s if rank.is_on_first_node else cluster.peer_timeout_s
    feed = FeedSubscriber(place.host, accepted.feed_port, keys=client_keys(cluster))
    try:
        run_over = until_end(feed, silence_s)
        return await supervise(resolved, plan, stopping=stopping, run_over=run_over)
    finally:
        await feed.close()


def _own_gpus(config: Config, rank: Rank) -> dict[str, str]:
    """Let the actor see the GPUs that its model is split over; nothing changes where there is no
    GPU. Learners on this node have the first ones, and with one GPU an actor they may be shared.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    each = config.actors.weight_ranks
    num_learners = max(0, config.cluster.learners - (rank.rank - rank.local_rank))
    first = num_learners + (rank.local_rank - num_learners) * each
    if each > 1 and first + each > count:
        raise ConfigError(
            "actors.vllm.tensor_parallel",
            each,
            f"rank {rank.rank} would need GPUs {first} to {first + each - 1} of its node, which "
            f"has {count}; start fewer processes a node, or split over fewer GPUs",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    chosen = [visible[(first + i) % len(visible)] for i in range(each)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
