"""A learner rank other than 0: joins the lead, then executes its commands.

waits for  the lead's address and plan (cluster.connect_timeout_s), on other nodes the run folder
           (SHARED_FOLDER_S), then as following.py
"""

import asyncio
import contextlib
import importlib
import json
from pathlib import Path
from types import ModuleType

from speed_async.config.load import parse_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, DeadlineExceeded, RoleError, SpeedAsyncError
from speed_async.launcher.event_loop import stop_event
from speed_async.launcher.exit_status import describe
from speed_async.launcher.large_imports import large_imports
from speed_async.launcher.logs import log_to
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import node_rendezvous
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.following import Alive, Follow, LeadPlan, StopFollowing
from speed_async.transport.transport import Link
from speed_async.transport.zeromq import open_link

ASK_AGAIN_S = 5.0
"""Follow is sent again after this: the address may be that of an earlier attempt."""
LOOK_UP_AGAIN_S = 0.1
SHARED_FOLDER_S = 60.0
"""How long a network file system may show an earlier state of a folder: the default of NFS."""
LOOK_AGAIN_S = 0.5
VERDICT_S = 8.0
"""The lead waits before it names a lost rank, so that it names the first one."""
QUEUED_MESSAGES = 4096
"""A batch has one message for each group."""


async def follow_run(config: Config, rank: Rank) -> None:
    """Run this rank until the lead ends the run. Raises SpeedAsyncError."""
    stopping = stop_event()
    # Before the lead is joined, whose messages would not be received meanwhile: it takes seconds.
    work = await asyncio.to_thread(_import_work)
    joined = await _join(config, rank)
    if joined is None:
        return
    link, plan = joined
    role = f"learner-{rank.rank}"
    try:
        resolved = parse_config(json.loads(plan.config))
        if not rank.is_on_first_node:
            await _find_run_folder(resolved, role, link)
            model = resolved.model.model_copy(update={"path": config.model.path})
            resolved = resolved.model_copy(update={"model": model})
        log_to(RunFolder(path=Path(resolved.run.folder)).log(role))
        await work.follow(resolved, rank, link, plan, stopping)
    except Exception as error:  # boundary of the role: reported to the lead, then re-raised
        text = describe(role, error)
        with contextlib.suppress(SpeedAsyncError):
            await link.send(m.Failure(role=role, message=text))
        if isinstance(error, SpeedAsyncError):
            raise
        raise await lead_verdict(link) or RoleError(role, text) from error
    finally:
        await link.close()


async def _find_run_folder(config: Config, role: str, link: Link) -> None:
    """Wait until the run folder has this configuration, which the lead has written there. Every
    learner rank reads and writes checkpoints there. Raises ConfigError."""
    folder = RunFolder(path=Path(config.run.folder))
    clock = asyncio.get_running_loop().time
    ends_s = clock() + SHARED_FOLDER_S
    while not await asyncio.to_thread(_has_config, folder, config.model_dump_json()):
        if clock() > ends_s:
            raise ConfigError(
                "run.folder",
                str(folder.path),
                f"{role}, which runs on another node than rank 0, does not find the "
                f"{folder.config.name} of this run there: learners on several nodes read and write "
                "checkpoints in one folder; use a path on a file system that all of them share",
            )
        await link.send(Alive())
        await asyncio.sleep(LOOK_AGAIN_S)


def _has_config(folder: RunFolder, text: str) -> bool:
    """Whether the folder has this configuration: another node may have a run of its own there."""
    try:
        return parse_config(json.loads(folder.config.read_text())).model_dump_json() == text
    except (OSError, ValueError, SpeedAsyncError):
        return False


async def lead_verdict(link: Link) -> RoleError | None:
    """What ended the run, for a follower whose own work failed unexpectedly: the loss of one rank
    makes the collective operations of all others fail, and only the lead knows which one it was.
    None when the lead names nothing."""
    clock = asyncio.get_running_loop().time
    ends_s, is_alive = clock() + VERDICT_S, False
    with contextlib.suppress(DeadlineExceeded):
        while (left_s := ends_s - clock()) > 0:
            message = await link.receive(left_s)
            is_alive = True
            if isinstance(message, StopFollowing):
                return RoleError.from_text(message.error) if message.error else None
    return None if is_alive else RoleError("learner (rank 0)", "has exited or cannot be reached")


def _import_work() -> ModuleType:
    with large_imports():
        return importlib.import_module("speed_async.launcher.roles.learner_work")


async def _join(config: Config, rank: Rank) -> tuple[Link, LeadPlan] | None:
    """The link to the lead and its plan; None when there is nothing to do. Raises
    DeadlineExceeded."""
    cluster, clock = config.cluster, asyncio.get_running_loop().time
    ends_s = clock() + cluster.connect_timeout_s
    rendezvous = node_rendezvous() if rank.is_on_first_node else None
    while (left_s := ends_s - clock()) > 0:
        host, port = cluster.host, cluster.learner_port
        if rendezvous is not None:
            record = rendezvous.read()
            if record.nothing_to_do:
                return None
            host, port = record.host, record.learner_port
        if not port:
            await asyncio.sleep(LOOK_UP_AGAIN_S)
            continue
        link = await open_link(
            host,
            port,
            f"learner-{rank.rank}",
            inbox_messages=QUEUED_MESSAGES,
            silence_s=2 * cluster.peer_timeout_s,  # the follower's loop decides first
            keys=client_keys(cluster),
        )
        ask_s = min(left_s, ASK_AGAIN_S)
        with contextlib.suppress(DeadlineExceeded, TimeoutError):
            # After a failed handshake there is no connection to queue it for.
            await asyncio.wait_for(link.send(Follow(rank=rank.rank)), ask_s)
            reply = await link.receive(ask_s)
            while not isinstance(reply, LeadPlan):
                reply = await link.receive(ask_s)
            return link, reply
        await link.close()
    raise DeadlineExceeded("the learner (rank 0)", "its plan", cluster.connect_timeout_s)
