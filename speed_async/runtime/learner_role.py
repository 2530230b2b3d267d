"""The first learner rank: starts the service and the console, trains, and writes the summary.

waits for  the service's ports, the service's messages (learner/loop.py), the children's ends
"""

import asyncio
import contextlib
import json
import os
import signal
import sys

import torch

from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded, RoleError, SpeedAsyncError
from speed_async.learner.loop import Finished, LearnerLoop
from speed_async.learner.model import load_model, stored_dtype
from speed_async.learner.parallel import SingleRank
from speed_async.learner.trainer import Trainer
from speed_async.observe.report import plot_accuracy, summary_text
from speed_async.runtime.failure import describe, recorded
from speed_async.runtime.processes import end_process, log_to, start_role
from speed_async.runtime.rendezvous import Rank, Rendezvous, ServiceAddress
from speed_async.runtime.run_folder import RunFolder, make_run_folder
from speed_async.tasks.registry import make_task
from speed_async.tasks.task import fingerprint
from speed_async.weights.broadcast import TorchSender
from speed_async.weights.process_group import choose_backend
from speed_async.wire import messages as m
from speed_async.wire.transport import Link
from speed_async.wire.zeromq import open_link

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
    folder, config = make_run_folder(config)
    log_to(folder.log(ROLE))
    service, ports = await _start_service(config, folder)
    console: asyncio.subprocess.Process | None = None
    grace_s = FAILED_GRACE_S
    try:
        address = ServiceAddress(
            host=config.cluster.host,
            port=ports["port"],
            feed_port=ports["feed_port"],
            run_folder=str(folder.path),
        )
        sys.stderr.write(f"metrics feed at tcp://{address.host}:{address.feed_port}\n")
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
) -> Finished:
    """Train; a service that dies meanwhile ends it."""
    link = await open_link(address.host, address.port, ROLE)
    training = asyncio.create_task(_learn(config, rank, link, folder, stop), name=ROLE)
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


async def _learn(
    config: Config, rank: Rank, link: Link, folder: RunFolder, stop: asyncio.Event
) -> Finished:
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    task = make_task(config.task)
    model = await asyncio.to_thread(load_model, config.model.path, device=config.learner.device)
    trainer = Trainer(config=config, model=model, parallel=SingleRank())
    device = next(model.parameters()).device
    sender = TorchSender(
        host=config.cluster.host,
        bucket_bytes=config.weights.bucket_bytes,
        device=device,
        cast=stored_dtype(config.model.path) if device.type == "cuda" else None,
        store_timeout_s=config.weights.deadline_s,
    )
    backend = choose_backend(
        config.weights.backend,
        device.type,
        num_visible_gpus=torch.cuda.device_count(),
        num_local_ranks=rank.local_world_size,
    )
    loop = LearnerLoop(
        config,
        link=link,
        updates=trainer,
        sender=sender,
        backend=backend,
        stop=stop,
    )
    try:
        return await loop.run(
            m.Hello(
                role=ROLE,
                index=rank.rank,
                incarnation=rank.restart,
                fingerprint=fingerprint(task),
                process_id=os.getpid(),
            )
        )
    finally:
        sender.close()


def _write_results(finished: Finished, folder: RunFolder, *, breakdown: bool) -> None:
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
