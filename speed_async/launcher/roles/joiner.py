"""An actor that joins a run by itself: asks the service what to be, then supervises it.

consumes   the service's answer, then the metrics feed, for the run's end
waits for  the answer (the caller's deadline), the child; a silent feed (peer timeout) ends it
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from speed_async.config.load import build_config
from speed_async.config.schema import Config
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
from speed_async.launcher.roles.join import Admitted, ask_for_place, until_end
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import make_run_folder
from speed_async.transport import messages as m
from speed_async.transport.curve import ClientKeys, load_client_keys
from speed_async.transport.feed import FeedSubscriber


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
    actor was told to stop. Raises SpeedAsyncError; LostRun when the run falls silent.
    """
    curve = load_client_keys(keys) if keys is not None else None
    stopping = stop_event()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        place = await ask_for_place(
            lambda: (host, port), stopping=stopping, timeout_s=timeout_s, keys=curve
        )
    except DeadlineExceeded as error:
        raise DeadlineExceeded(
            error.whom,
            "nobody answers there. The address stands in the run's logs/learner.log (\"actors join "
            "at\"; not the metrics feed's), cluster.host must be one that reaches this machine, "
            "and a run that has keys answers allowed clients alone: give this one's as --keys",
            timeout_s,
        ) from None
    if place is None:
        return False
    name = f"actor-{place.accepted.index}"
    try:
        config = localized(
            place.accepted.config,
            model=model,
            data=data,
            run_folder=run_folder or Path("runs") / name,
            keys=keys,
        )
        await _take_part(place, stopping, config, curve)
    except SpeedAsyncError as error:
        await place.link.send(m.Failure(role=name, message=str(error)))
        raise
    finally:
        await place.link.close()
    return not stopping.is_set()


async def _take_part(
    place: Admitted, stopping: asyncio.Event, config: Config, curve: ClientKeys | None
) -> None:
    name = f"actor-{place.accepted.index}"
    folder, config = make_run_folder(config)
    plan = ActorPlan(
        index=place.accepted.index,
        host=place.host,
        port=place.port,
        folder=folder.path,
        first_incarnation=place.accepted.incarnation,
        joined=True,
        environment=_engine_environment(config),
    )
    address = address_at(place.host, place.port)
    print(f"joined {address} as {name}; its logs are in {folder.path / 'logs'}")
    sys.stdout.flush()
    feed = FeedSubscriber(place.host, place.accepted.feed_port, keys=curve)
    try:
        run_over = until_end(feed, config.cluster.peer_timeout_s)
        end = await supervise(config, plan, stopping=stopping, run_over=run_over)
    finally:
        await feed.close()
    if end is not None and end.outcome == "failed":
        raise SpeedAsyncError(f"the run failed: {end.reason}")


def localized(
    text: str,
    *,
    model: Path | None,
    data: Path | None,
    run_folder: Path | None,
    keys: Path | None,
) -> Config:
    """The run's configuration with this machine's paths. Raises ConfigError for a missing one."""
    try:
        tree = json.loads(text)
        if run_folder is not None:
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
        raise ConfigErrors.of([_on_this_machine(each) for each in error.errors]) from None


def _on_this_machine(error: ConfigError) -> ConfigError:
    option = {"model.path": "--model", "task.path": "--data"}.get(error.field)
    if option is None:
        return error
    remedy = f"{error.remedy} on this machine; give its place here with {option}"
    return ConfigError(error.field, error.value, remedy)


def _engine_environment(config: Config) -> dict[str, str]:
    if config.actors.engine != "vllm":
        return {}  # and no torch is loaded to find that out
    from speed_async.launcher.roles.engine_choice import engine_environment

    return engine_environment(config)
