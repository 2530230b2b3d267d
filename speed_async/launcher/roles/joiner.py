"""`speed-async actor --join`: requests an actor index from the service, then supervises the actor.

consumes   the service's reply, then the metrics feed (for the end event)
waits for  the reply (the caller's deadline), the child; ends when the feed is silent (peer timeout)
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speed_async.config.hub_id import local_or_hub
from speed_async.config.load import build_config
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.config.sources import TaskSource
from speed_async.errors import (
    ConfigError,
    ConfigErrors,
    DeadlineExceeded,
    ProtocolError,
    SpeedAsyncError,
)
from speed_async.launcher.event_loop import stop_event
from speed_async.launcher.ports import address_at
from speed_async.launcher.processes import ENVIRONMENT
from speed_async.launcher.roles.engine_environment import engine_environment
from speed_async.launcher.roles.join import Admitted, request_admission, wait_for_run_end
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import make_run_folder
from speed_async.transport import messages as m
from speed_async.transport.curve import ClientKeys, load_client_keys
from speed_async.transport.feed import FeedSubscriber


async def join_run(
    host: str,
    port: int,
    *,
    model: str | None,
    data: str | None,
    run_folder: Path | None,
    timeout_s: float,
    keys: Path | None = None,
) -> bool:
    """Run an actor of the run whose service is at this address until the run ends or a signal
    arrives.

    `keys`: this client's key folder, for a run with keys. Returns True when the run ended, False
    when a signal stopped this actor. Raises SpeedAsyncError; RunLost when the feed is silent.
    """
    curve = load_client_keys(keys) if keys is not None else None
    stopping = stop_event()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        admitted = await request_admission(
            lambda: (host, port), stopping=stopping, timeout_s=timeout_s, keys=curve
        )
    except DeadlineExceeded as error:
        raise DeadlineExceeded(
            error.peer,
            'no reply. The address is in the run\'s logs/learner.log ("actors join at"; not that '
            "of the metrics feed), cluster.host must be reachable from this machine, and a run "
            "with keys replies to allowed clients only: pass this client's key folder as --keys",
            timeout_s,
        ) from None
    if admitted is None:
        return False
    name = f"actor-{admitted.accepted.index}"
    try:
        config = localized(
            admitted.accepted.config,
            model=model,
            data=data,
            run_folder=run_folder or Path("runs") / name,
            keys=keys,
        )
        await _run_actor(admitted, stopping, config, curve)
    except SpeedAsyncError as error:
        await admitted.link.send(m.Failure(role=name, message=str(error)))
        raise
    finally:
        await admitted.link.close()
    return not stopping.is_set()


async def _run_actor(
    admitted: Admitted, stopping: asyncio.Event, config: Config, curve: ClientKeys | None
) -> None:
    host, port, accepted = admitted.host, admitted.port, admitted.accepted
    folder, config = make_run_folder(config)
    plan = ActorPlan(
        index=accepted.index,
        host=host,
        port=port,
        folder=folder.path,
        first_incarnation=accepted.incarnation,
        joined=True,
        environment=engine_environment(config),
    )
    address = address_at(host, port)
    print(f"joined {address} as {plan.role}; its logs are in {folder.path / 'logs'}")
    sys.stdout.flush()
    feed = FeedSubscriber(host, accepted.feed_port, keys=curve)
    try:
        run_over = wait_for_run_end(feed, config.cluster.peer_timeout_s)
        end = await supervise(config, plan, stopping=stopping, run_over=run_over)
    finally:
        await feed.close()
    if end is not None and end.outcome == "failed":
        raise SpeedAsyncError(f"the run failed: {end.reason}")


def localized(
    text: str,
    *,
    model: str | None,
    data: str | None,
    run_folder: Path | None,
    keys: Path | None,
    sources: Sequence[TaskSource] = (),
) -> Config:
    """Parse the run's configuration and replace paths by those of this machine. `model` and `data`
    may be ids of the hub. Raises ConfigError for a missing path, and for a model of the hub that
    this machine neither has nor can download."""
    try:
        tree = json.loads(text)
        if run_folder is not None:
            tree["run"]["folder"] = str(run_folder)
        if model is not None:
            tree["model"]["path"] = local_or_hub(model, Path.cwd())
        if data is not None:
            tree["task"]["path"] = local_or_hub(data, Path.cwd())
        if sources:
            tree["task"]["sources"] = [source.model_dump() for source in sources]
        tree["cluster"]["keys"] = str(keys.expanduser().resolve()) if keys is not None else None
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"the run's configuration is malformed: {error}") from None
    try:
        config = build_config(tree)
        model_folder(config.model.path)
        return config
    except ConfigError as error:
        raise ConfigErrors.of([_on_this_machine(each) for each in error.errors]) from None


def _on_this_machine(error: ConfigError) -> ConfigError:
    option = {"model.path": "--model", "task.path": "--data"}.get(error.field)
    if option is None:
        return error
    remedy = f"{error.remedy} on this machine; set its local path with {option}"
    return ConfigError(error.field, error.value, remedy)
