"""An actor that joins a run by itself: asks the service what to be, then supervises it.

consumes   the service's answer, then the metrics feed, for the run's end
waits for  the answer (the caller's deadline), the child; a silent feed (peer timeout) ends it
"""

import asyncio
import json
import os
import signal
import socket
import sys
import uuid
from pathlib import Path

from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, DeadlineExceeded, ProtocolError, SpeedAsyncError
from speed_async.runtime.ports import address_at
from speed_async.runtime.processes import ENVIRONMENT
from speed_async.runtime.run_folder import make_run_folder
from speed_async.runtime.supervisor import ActorPlan, supervise
from speed_async.wire import messages as m
from speed_async.wire.curve import ClientKeys, load_client_keys
from speed_async.wire.feed import FeedSubscriber
from speed_async.wire.joining import Join, JoinAccepted
from speed_async.wire.transport import Link
from speed_async.wire.zeromq import open_link

ASK_AGAIN_S = 5.0


async def join_run(
    host: str,
    port: int,
    *,
    model: Path | None,
    data: Path | None,
    run_folder: Path | None,
    timeout_s: float,
    keys: Path | None = None,
) -> bool:
    """Take part in the run whose service is at this address, until it ends or a signal comes.

    `keys`: this client's folder, for a run that has keys. True when the run ended, False when this
    actor was told to stop. Raises SpeedAsyncError.
    """
    curve = load_client_keys(keys) if keys is not None else None
    stopping = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stopping.set)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    link = await open_link(host, port, f"join-{uuid.uuid4().hex}", keys=curve)
    try:
        accepted = await _ask(link, stopping, address_at(host, port), timeout_s)
        if accepted is None:
            return False
        try:
            config = _local_config(
                accepted.config,
                model=model,
                data=data,
                run_folder=run_folder or Path("runs") / f"actor-{accepted.index}",
                keys=keys,
            )
            await _take_part(host, port, accepted, stopping, config, curve)
        except SpeedAsyncError as error:
            await link.send(m.Failure(role=f"actor-{accepted.index}", message=str(error)))
            raise
    finally:
        await link.close()
    return not stopping.is_set()


async def _ask(
    link: Link, stopping: asyncio.Event, address: str, timeout_s: float
) -> JoinAccepted | None:
    """The service's answer; None when a stop comes first."""
    answering = asyncio.create_task(_answer(link, timeout_s), name="answer")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    await asyncio.wait((answering, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not answering.done():
        answering.cancel()
        return None
    try:
        answer = await answering
    except DeadlineExceeded:
        raise DeadlineExceeded(
            f"a run at {address}",
            "nobody answers there. The address stands in the run's logs/learner.log (\"actors join "
            "at\"; not the metrics feed's), cluster.host must be one that reaches this machine, "
            "and a run that has keys answers allowed clients alone: give this one's as --keys",
            timeout_s,
        ) from None
    except ProtocolError as error:
        raise ProtocolError(f"the service at {address} speaks another protocol: {error}") from None
    if isinstance(answer, m.Rejected):
        raise SpeedAsyncError(f"the run at {address} does not take this actor: {answer.reason}")
    if not isinstance(answer, JoinAccepted):
        raise ProtocolError(f"{address} answered Join with {type(answer).__name__}")
    return answer


async def _answer(link: Link, timeout_s: float) -> m.Message:
    """Ask until there is an answer: a service that is killed may take the question with it."""
    clock = asyncio.get_running_loop().time
    ends_s = clock() + timeout_s
    while True:
        await link.send(Join(machine=socket.gethostname(), process_id=os.getpid()))
        left_s = ends_s - clock()
        try:
            return await link.receive(min(left_s, ASK_AGAIN_S))
        except DeadlineExceeded:
            if left_s <= ASK_AGAIN_S:
                raise


async def _take_part(
    host: str,
    port: int,
    accepted: JoinAccepted,
    stopping: asyncio.Event,
    config: Config,
    curve: ClientKeys | None,
) -> None:
    name = f"actor-{accepted.index}"
    folder, config = make_run_folder(config)
    plan = ActorPlan(
        index=accepted.index,
        host=host,
        port=port,
        folder=folder.path,
        joined=True,
        environment=_engine_environment(config),
    )
    print(f"joined {address_at(host, port)} as {name}; its logs are in {folder.path / 'logs'}")
    sys.stdout.flush()
    feed = FeedSubscriber(host, accepted.feed_port, keys=curve)
    try:
        run_over = _until_end(feed, config.cluster.peer_timeout_s)
        await supervise(config, plan, stopping=stopping, run_over=run_over)
    finally:
        await feed.close()


def _local_config(
    text: str, *, model: Path | None, data: Path | None, run_folder: Path, keys: Path | None
) -> Config:
    """The run's configuration with this machine's paths. Raises ConfigError for a missing one."""
    try:
        tree = json.loads(text)
        tree["run"]["folder"] = str(run_folder)
        if model is not None:
            tree["model"]["path"] = str(model.expanduser().resolve())
        if data is not None:
            tree["task"]["path"] = str(data.expanduser().resolve())
        tree["cluster"]["keys"] = str(keys.expanduser().resolve()) if keys is not None else None
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"the run's configuration is malformed: {error}") from None
    try:
        return build_config(tree)
    except ConfigError as error:
        remedies = {"model.path": "--model", "task.path": "--data"}
        if option := remedies.get(error.field):
            remedy = f"{error.remedy} on this machine; give its place here with {option}"
            raise ConfigError(error.field, error.value, remedy) from None
        raise


def _engine_environment(config: Config) -> dict[str, str]:
    if config.actors.engine != "vllm":
        return {}  # and no torch is loaded to find that out
    from speed_async.actors.engine_choice import engine_environment

    return engine_environment(config)


async def _until_end(feed: FeedSubscriber, silence_s: float) -> None:
    """Return at the run's last event. Raises SpeedAsyncError when that tells of a failure, and
    DeadlineExceeded when the feed falls silent."""
    while (event := await feed.receive(silence_s)).kind != "end":
        pass
    if event.values.get("ok") is not True:
        raise SpeedAsyncError(f"the run failed: {event.values.get('reason')}")
