"""The first learner rank: starts the service and the console, trains, and writes the summary.

waits for  the service's ports, the service's messages (learner/loop.py), the children's ends
"""

import asyncio
import contextlib
import importlib
import json
import signal
import sys
from typing import TYPE_CHECKING

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError, SpeedAsyncError
from speed_async.observe.report import plot_accuracy, summary_text
from speed_async.runtime.failure import describe, recorded
from speed_async.runtime.processes import end_process, log_to, start_role
from speed_async.runtime.rendezvous import Rank, Rendezvous, ServiceAddress
from speed_async.runtime.run_folder import RunFolder, make_run_folder
from speed_async.wire import messages as m
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


async def lead_run(config: Config, rank: Rank) -> bool:
    """The whole run, seen from its first rank. True when it was completed, False when stopped."""
    stop = asyncio.Event()
    for stopper in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stopper, stop.set)
    # torchrun decides how many actors there are, whatever the file says.
    num_actors = rank.world_size - config.cluster.learners
    cluster = config.cluster.model_copy(update={"actors": num_actors})
    folder, config = make_run_folder(config.model_copy(update={"cluster": cluster}))
    log_to(folder.log(ROLE))
    service, ports = await _start_service(config, folder)
    console: asyncio.subprocess.Process | None = None
    grace_s = FAILED_GRACE_S
    try:
        address = ServiceAddress(
            host=config.cluster.host,
            port=config.cluster.advertised_port or ports["port"],
            feed_port=ports["feed_port"],
            run_folder=str(folder.path),
        )
        sys.stderr.write(f"metrics feed at tcp://{address.host}:{address.feed_port}\n")
        sys.stderr.write(f"actors join at tcp://{address.host}:{address.port}\n")
        rendezvous = Rendezvous(rank, config.cluster.connect_timeout_s)
        await asyncio.to_thread(rendezvous.publish, address)
        console = await _start_console(address, folder)
        watch = asyncio.create_task(service.wait(), name="service")
        finished = await _train(config, rank, address, folder, stop, watch)
        await asyncio.to_thread(rendezvous.end)
        grace_s = UPLOAD_GRACE_S if config.observe.wandb else CHILD_GRACE_S
    finally:
        await end_process(service, grace_s)
        if console is not None:
            await end_process(console, grace_s)
    _write_results(finished, folder, breakdown=config.observe.breakdown)
    if finished.save_error:
        raise RoleError(ROLE, finished.save_error)
    return finished.completed


async def _start_service(
    config: Config, folder: RunFolder
) -> tuple[asyncio.subprocess.Process, dict[str, int]]:
    arguments = ["--config", str(folder.config), "--run-folder", str(folder.path)]
    process = await start_role("service", arguments, log=folder.log("service"))
    assert process.stdout is not None
    deadline_s = config.cluster.connect_timeout_s
    try:
        line = await asyncio.wait_for(process.stdout.readline(), deadline_s)
    except TimeoutError:
        await end_process(process, 0.1)
        raise DeadlineExceeded("the buffer service", "its ports", deadline_s) from None
    if not line:
        await process.wait()
        raise _service_error(folder)
    return process, json.loads(line)


def _service_error(folder: RunFolder) -> RoleError:
    text = recorded(folder.error("service"))
    return RoleError.quoting(text or f"buffer service: died; read {folder.log('service')}")


async def _start_console(address: ServiceAddress, folder: RunFolder) -> asyncio.subprocess.Process:
    arguments = ["--host", address.host, "--port", str(address.feed_port)]
    arguments += ["--run-folder", str(folder.path)]
    return await start_role("console", arguments, log=folder.log("console"), stdout=None)


async def _train(
    config: Config,
    rank: Rank,
    address: ServiceAddress,
    folder: RunFolder,
    stop: asyncio.Event,
    watch: asyncio.Task[int],
) -> "Finished":
    """Train; a service that dies meanwhile ends it."""
    # Seconds to import, while the actors, which wait for the service alone, do the same.
    work = await asyncio.to_thread(importlib.import_module, "speed_async.runtime.learner_work")
    link = await open_link(address.host, address.port, ROLE)
    link = tapped(link, config.observe.trace, ROLE)
    training = asyncio.create_task(work.learn(config, rank, link, stop), name=ROLE)
    try:
        await asyncio.wait((training, watch), return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            # The service ends by itself after its last message, which may still be under way.
            await asyncio.wait((training,), timeout=CHILD_GRACE_S)
        if not training.done():
            training.cancel()
            raise _service_error(folder)
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
        "optimizer_updates": finished.optimizer_updates,
        "skipped_updates": finished.skipped_updates,
        "policy_version": finished.policy_version,
        "completions_trained": finished.completions_trained,
        "tokens_trained": finished.tokens_trained,
        "run_folder": str(folder.path),
    }
    folder.write_summary(summary)
    plot_accuracy(folder.path)
    sys.stdout.write(summary_text(summary, breakdown=breakdown) + "\n")
    sys.stdout.flush()
