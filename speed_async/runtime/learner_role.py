"""The first learner rank: starts the service and the console, trains, and writes the summary.

waits for  the service's ports, the service's messages (learner/loop.py), the children's ends
"""

import asyncio
import contextlib
import importlib
import signal
import sys
from typing import TYPE_CHECKING

from speed_async.config.schema import Config
from speed_async.errors import RoleError, RunFinished, SpeedAsyncError
from speed_async.observe.report import plot_accuracy, summary_text
from speed_async.runtime.failure import describe
from speed_async.runtime.life import Life, begin_life, remember_ports
from speed_async.runtime.logs import log_to
from speed_async.runtime.processes import end_process, start_role
from speed_async.runtime.rendezvous import Rank, Rendezvous, ServiceAddress
from speed_async.runtime.run_folder import RunFolder
from speed_async.runtime.service_process import ServiceProcess
from speed_async.runtime.stages import stage
from speed_async.wire import messages as m
from speed_async.wire.curve import client_keys
from speed_async.wire.session import SessionLink
from speed_async.wire.tap import tapped
from speed_async.wire.zeromq import open_link

if TYPE_CHECKING:
    from speed_async.learner.loop import Finished

ROLE = "learner"
CHILD_GRACE_S = 5.0
"""After the last message, service and console end by themselves within this."""
UPLOAD_GRACE_S = 60.0
"""The same where wandb may still have to upload."""
FAILED_GRACE_S = 1.0


async def lead_run(config: Config, rank: Rank, *, resume: bool) -> bool:
    """One life of a run, seen from its first rank: of a new one, or (`resume`, and after a restart
    of the ranks) of one that was begun before.

    True when the run was completed, False when it was stopped.
    """
    stop = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stop.set)
    # torchrun decides how many actors there are, whatever the file says.
    num_actors = rank.world_size - config.cluster.learners
    cluster = config.cluster.model_copy(update={"actors": num_actors})
    config = config.model_copy(update={"cluster": cluster})
    rendezvous = Rendezvous(config.cluster.connect_timeout_s)
    begun_in = await asyncio.to_thread(rendezvous.begun_in)
    try:
        life = await asyncio.to_thread(begin_life, config, begun_in=begun_in, resume=resume)
    except RunFinished as finished:
        await asyncio.to_thread(rendezvous.nothing_to_do)
        sys.stdout.write(f"{finished}\n")
        return True
    config, folder = life.config, life.folder
    await asyncio.to_thread(rendezvous.begin, folder.path)
    sys.stderr.writelines(life.first_words())  # on the terminal, while nothing is drawn there yet
    stage(f"run folder {folder.path}; starting the service")
    log_to(folder.log(ROLE))
    sys.stderr.writelines([f"life {life.number}\n", *life.first_words()])
    service = ServiceProcess(config, folder, life=life.number)
    await service.start(life.ports)
    console: asyncio.subprocess.Process | None = None
    watch: asyncio.Task[None] | None = None
    grace_s = FAILED_GRACE_S
    try:
        remember_ports(life, service.ports)
        address = ServiceAddress(
            host=config.cluster.host,
            port=config.cluster.advertised_port or service.ports.service,
            feed_port=service.ports.feed,
            run_folder=str(folder.path),
            life=life.number,
        )
        sys.stderr.write(f"metrics feed at tcp://{address.host}:{address.feed_port}\n")
        sys.stderr.write(f"actors join at tcp://{address.host}:{address.port}\n")
        await asyncio.to_thread(rendezvous.publish, address)
        console = await _start_console(address, folder)
        watch = asyncio.create_task(service.watch(), name="service")
        finished = await _train(life, rank, address, stop, service, watch)
        await asyncio.to_thread(rendezvous.end, life.number)
        grace_s = UPLOAD_GRACE_S if config.observe.wandb else CHILD_GRACE_S
    finally:
        if watch is not None:
            await asyncio.wait((watch,), timeout=grace_s)  # it ends by itself after its last word
            watch.cancel()
        await service.end(FAILED_GRACE_S)
        if console is not None:
            await end_process(console, grace_s)
    _write_results(finished, folder, breakdown=config.observe.breakdown)
    if finished.save_error:
        raise RoleError(ROLE, finished.save_error)
    return finished.completed


async def _start_console(address: ServiceAddress, folder: RunFolder) -> asyncio.subprocess.Process:
    arguments = ["--host", address.host, "--port", str(address.feed_port)]
    arguments += ["--config", str(folder.config), "--run-folder", str(folder.path)]
    log = folder.log("console")
    return await start_role("console", arguments, log=log, stdin=None, stdout=None)


async def _train(
    life: Life,
    rank: Rank,
    address: ServiceAddress,
    stop: asyncio.Event,
    service: ServiceProcess,
    watch: asyncio.Task[None],
) -> "Finished":
    """Train; a service that dies meanwhile ends it."""
    # Seconds to import, while the actors, which wait for the service alone, do the same.
    work = await asyncio.to_thread(importlib.import_module, "speed_async.runtime.learner_work")
    keys = client_keys(life.config.cluster)
    wire = await open_link(address.host, address.port, ROLE, keys=keys)
    link = SessionLink(tapped(wire, life.config.observe.trace, ROLE))
    training = asyncio.create_task(work.learn(life, rank, link, stop), name=ROLE)
    try:
        await asyncio.wait((training, watch), return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            # The service ends by itself after its last message, which may still be under way.
            await asyncio.wait((training,), timeout=CHILD_GRACE_S)
        if not training.done():
            training.cancel()
            if watch.exception() is not None:
                await watch
            raise service.error()
        return await training
    except Exception as error:  # the role's boundary: told to the others, then raised on
        with contextlib.suppress(SpeedAsyncError):
            await link.send(m.Failure(role=ROLE, message=describe(ROLE, error)))
        raise
    finally:
        await link.close()


def _write_results(finished: "Finished", folder: RunFolder, *, breakdown: bool) -> None:
    summary = finished.service_fields | {
        "reason": finished.reason,
        # A run that lacks its last checkpoint can be resumed for it.
        "completed": finished.completed and not finished.save_error,
        "accuracy_reached": finished.accuracy_reached,
        "optimizer_updates": finished.optimizer_updates,
        "skipped_updates": finished.skipped_updates,
        "policy_version": finished.policy_version,
        "completions_trained": finished.completions_trained,
        "tokens_trained": finished.tokens_trained,
        "run_folder": str(folder.path),
        "notices": list(finished.notices),
    }
    folder.write_summary(summary)
    plot_accuracy(folder.path)
    sys.stdout.write(summary_text(summary, breakdown=breakdown) + "\n")
    sys.stdout.flush()
