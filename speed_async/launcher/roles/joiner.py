"""`speed-async actor --join`: requests an actor index from the service, then supervises the actor.

consumes   the service's reply, then the metrics feed (for the end event)
waits for  the reply (the caller's deadline), the child; ends when the feed is silent (peer timeout)
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from speed_async.config.hub_id import local_or_hub
from speed_async.config.load import build_config
from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.config.sections.sources import TaskSource
from speed_async.errors import (
    ConfigError,
    ConfigErrors,
    DeadlineExceeded,
    ProtocolError,
    SpeedAsyncError,
)
from speed_async.launcher.event_loop import stop_event
from speed_async.launcher.free_gpus import claim_gpus
from speed_async.launcher.gpus import visible_gpus
from speed_async.launcher.ports import address_at
from speed_async.launcher.processes import ENVIRONMENT
from speed_async.launcher.rendezvous import private_folder
from speed_async.launcher.roles.engine_environment import engine_environment, num_gpus
from speed_async.launcher.roles.join import (
    Admitted,
    describe_silence,
    request_admission,
    wait_for_run_end,
)
from speed_async.launcher.roles.supervisor import ActorPlan, supervise
from speed_async.launcher.run_folder import RunFolder, make_run_folder
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
            f"no reply; {await describe_silence(host, port)}. The address is in the run's "
            'logs/learner.log ("actors join at"; not that of the metrics feed), cluster.host must '
            "be reachable from this machine, and a run with keys replies to allowed clients only: "
            "pass this client's key folder as --keys",
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
    folder, config = make_run_folder(config)
    with ExitStack() as claims:
        visible = await asyncio.to_thread(choose_gpus, config, num_gpus(), claims)
        await _supervise(admitted, stopping, config, curve, folder, visible)


def choose_gpus(config: Config, num_visible: int, claims: ExitStack) -> list[str]:
    """All visible GPUs, as entries of CUDA_VISIBLE_DEVICES; empty without GPUs.

    The first ones are for this actor, and claimed until `claims` is closed. The others stay
    visible, since weights may arrive in the memory of the learner's GPU.

    Raises ConfigError for a tensor-parallel actor that does not fit on this machine.
    """
    num = config.actors.weight_ranks
    if not num_visible or (config.actors.engine != "vllm" and config.actors.device == "cpu"):
        return []
    visible = visible_gpus(num_visible)
    if num > num_visible:
        raise ConfigError(
            "actors.vllm.tensor_parallel",
            num,
            f"this machine has {num_visible} visible GPUs; join from one with at least {num}",
        )
    choice = claim_gpus(num, visible, private_folder(), claims)
    shown = ", ".join(choice.gpus)
    if choice.shared:
        print(f"warning: other actors that joined have claimed all GPUs; this one shares {shown}")
    else:
        print(f"this actor uses GPU {shown}")
    return [*choice.gpus, *(each for each in visible if each not in choice.gpus)]


def gpu_environment(visible: Sequence[str]) -> dict[str, str]:
    """Environment in which CUDA sees these entries of CUDA_VISIBLE_DEVICES; empty without any."""
    if not visible:
        return {}
    # Their indices are those of nvidia-smi. By default, CUDA numbers the fastest GPU first.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(visible)}


async def _supervise(
    admitted: Admitted,
    stopping: asyncio.Event,
    config: Config,
    curve: ClientKeys | None,
    folder: RunFolder,
    visible: list[str],
) -> None:
    host, port, accepted = admitted.host, admitted.port, admitted.accepted
    plan = ActorPlan(
        index=accepted.index,
        host=host,
        port=port,
        folder=folder.path,
        first_incarnation=accepted.incarnation,
        joined=True,
        environment=gpu_environment(visible) | engine_environment(config),
    )
    address = address_at(host, port)
    print(f"joined {address} as {plan.role}; its logs are in {folder.path / 'logs'}")
    sys.stdout.flush()
    feed = FeedSubscriber(host, accepted.feed_port, keys=curve)
    try:
        run_over = wait_for_run_end(feed, config.cluster.peer_timeout_s)
        end = await supervise(
            config, plan, stopping=stopping, run_over=run_over, report=admitted.link.send
        )
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
