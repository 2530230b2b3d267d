"""Rank 0, the leading learner: starts the service and the console, trains, writes the summary.

waits for  the service's ports, the service's messages (learner/loop.py), the exits of the children
"""

import asyncio
import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from speed_async.config.schema import Config
from speed_async.errors import DataError, RoleError, RunFinished, SpeedAsyncError
from speed_async.launcher.attempt import Attempt, begin_attempt, recorded_outcome, save_ports
from speed_async.launcher.exit_status import describe, resume_hint
from speed_async.launcher.identity.identity import Identity
from speed_async.launcher.large_imports import large_imports
from speed_async.launcher.logs import log_to
from speed_async.launcher.ports import address_at
from speed_async.launcher.processes import end_process, start_role
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import RendezvousRecord, node_rendezvous
from speed_async.launcher.roles.service_process import ServiceProcess
from speed_async.launcher.roles.stopping import Stopping
from speed_async.launcher.run_folder import RunFolder
from speed_async.launcher.stages import log_stage
from speed_async.launcher.standard_streams import STDERR, write_stream
from speed_async.observability.report import plot_accuracy, summary_text
from speed_async.observability.summary import resume_line
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.session import SessionLink
from speed_async.transport.tracing import with_tracing
from speed_async.transport.zeromq import open_link

if TYPE_CHECKING:
    from speed_async.learner.inbox import Stop
    from speed_async.learner.progress import RunResult

ROLE = "learner"
CHILD_GRACE_S = 5.0
"""After the last message, the service and the console have this long to exit."""
UPLOAD_GRACE_S = 60.0
"""The same with wandb, which may still be uploading."""
FAILED_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceAddress:
    host: str
    port: int
    feed_port: int


async def lead_run(config: Config, rank: Rank, *, resume: bool) -> str:
    """Run one attempt of a new run, or of an existing one (`resume`, or after a restart of the
    ranks).

    Returns the outcome (observability/metrics.py); raises on failure.
    """
    stopping = Stopping()
    stopping.install()
    # The launcher determines the number of actors and overrides the configuration.
    num_actors = rank.world_size - config.cluster.learners
    cluster = config.cluster.model_copy(update={"actors": num_actors})
    config = config.model_copy(update={"cluster": cluster})
    rendezvous = node_rendezvous()
    run_folder = rendezvous.read().run_folder
    restarted_in = Path(run_folder) if run_folder else None
    rendezvous.write(RendezvousRecord(run_folder=run_folder))  # without an address: no service yet
    try:
        attempt = await asyncio.to_thread(
            begin_attempt, config, restarted_in=restarted_in, resume=resume
        )
    except RunFinished as finished:
        rendezvous.change(nothing_to_do=True)
        write_stream(f"{finished}\n")
        # Ranks restarted automatically after the end return the outcome of the run.
        return recorded_outcome(restarted_in) if restarted_in is not None else "completed"
    wanted = config.run.folder
    config, folder = attempt.config, attempt.folder
    rendezvous.change(run_folder=str(folder.path))
    if attempt.number == 0 and folder.path.name != Path(wanted).name:
        text = f"'{wanted}' contains a run; the new run is in '{folder.path}'"
        write_stream(f"{text} ({resume_hint(wanted)})\n", STDERR)
    banner = attempt.resume_banner()
    write_stream("".join(banner), STDERR)  # the console does not use the terminal yet
    log_stage(f"run folder {folder.path}; starting the service")
    log_to(folder.log(ROLE))
    sys.stderr.writelines([f"attempt {attempt.number}\n", *banner])
    finished = await _run_attempt(attempt, rank, stopping)
    _write_results(finished, folder, breakdown=config.observe.breakdown)
    if stopping.stop.has_lost_launcher:
        text = f"the launcher of this run has died; {resume_hint(folder.path)}\n"
        sys.stderr.write(text)
        write_stream(text)
    if finished.save_error:
        raise RoleError(ROLE, finished.save_error)
    return finished.outcome


async def _run_attempt(attempt: Attempt, rank: Rank, stopping: Stopping) -> "RunResult":
    """Start the service and the console, train, and end both. Raises what ended the training."""
    config, folder = attempt.config, attempt.folder
    rendezvous = node_rendezvous()
    identifying = asyncio.create_task(asyncio.to_thread(attempt.write_identity), name="identity")
    service = ServiceProcess(config, folder, attempt=attempt.number)
    await service.start(attempt.ports)
    console: asyncio.subprocess.Process | None = None
    watch: asyncio.Task[None] | None = None
    grace_s = FAILED_GRACE_S
    has_failed = True
    try:
        identity = await identifying  # must be saved before any actor can request work
        digesting = asyncio.create_task(asyncio.to_thread(attempt.add_weights, identity))
        save_ports(attempt, service.ports)
        address = ServiceAddress(
            host=config.cluster.host,
            port=config.cluster.advertised_port or service.ports.service,
            feed_port=service.ports.feed,
        )
        sys.stderr.write(f"metrics feed at {address_at(address.host, address.feed_port)}\n")
        sys.stderr.write(f"actors join at {address_at(address.host, address.port)}\n")
        rendezvous.change(host=address.host, port=address.port)
        console = await _start_console(address, folder)
        stopping.attach_console(console, folder)
        watch = asyncio.create_task(service.watch(), name="service")
        finished = await _train(attempt, identity, rank, address, stopping.stop, service, watch)
        has_failed = False
        stopping.complete()
        await digesting
        grace_s = UPLOAD_GRACE_S if config.observe.wandb else CHILD_GRACE_S
    finally:
        if watch is not None:
            await asyncio.wait((watch,), timeout=grace_s)  # it exits after its last message
            watch.cancel()
        await service.end(FAILED_GRACE_S)
        if console is not None:
            await end_process(console, grace_s)
        if has_failed:
            write_stream(f"{resume_line(str(folder.path))}\n")
    return finished


async def _start_console(address: ServiceAddress, folder: RunFolder) -> asyncio.subprocess.Process:
    arguments = ["--host", address.host, "--port", str(address.feed_port)]
    arguments += ["--config", str(folder.config), "--run-folder", str(folder.path)]
    log = folder.log("console")
    return await start_role("console", arguments, log=log, stdin=None, stdout=None)


async def _train(
    attempt: Attempt,
    identity: Identity,
    rank: Rank,
    address: ServiceAddress,
    stop: "Stop",
    service: ServiceProcess,
    watch: asyncio.Task[None],
) -> "RunResult":
    """Train until the run ends. Raises RoleError when the service dies."""
    # The import takes seconds; the actors, which only wait for the service, start in parallel.
    work = await asyncio.to_thread(_import_work)
    keys = client_keys(attempt.config.cluster)
    wire = await open_link(address.host, address.port, ROLE, keys=keys)
    link = SessionLink(with_tracing(wire, attempt.config.observe.trace, ROLE))
    training = asyncio.create_task(work.learn(attempt, rank, link, stop, identity), name=ROLE)
    try:
        await asyncio.wait((training, watch), return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            # The service exits after sending its last message, which may still be in transit.
            await asyncio.wait((training,), timeout=CHILD_GRACE_S)
        if not training.done():
            training.cancel()
            if watch.exception() is not None:
                await watch
            raise service.error()
        return await training
    except Exception as error:  # boundary of the role: reported to the service, then re-raised
        with contextlib.suppress(SpeedAsyncError):
            await link.send(m.Failure(role=ROLE, message=describe(ROLE, error)))
        raise
    finally:
        await link.close()


def _import_work() -> ModuleType:
    with large_imports():
        return importlib.import_module("speed_async.launcher.roles.learner_work")


def _write_results(finished: "RunResult", folder: RunFolder, *, breakdown: bool) -> None:
    progress = finished.progress
    summary = finished.service_fields | {
        "reason": finished.save_error or finished.reason,
        "outcome": "failed" if finished.save_error else finished.outcome,
        # Completed: all updates were made and saved, so there is nothing to resume.
        "completed": finished.outcome != "stopped" and not finished.save_error,
        "accuracy_reached": finished.accuracy_reached,
        "optimizer_updates": progress.optimizer_updates,
        "skipped_updates": progress.num_skipped,
        "policy_version": progress.policy_version,
        "completions_trained": progress.completions_trained,
        "tokens_trained": progress.tokens_trained,
        "run_folder": str(folder.path),
        "notices": list(finished.notices),
    }
    folder.write_summary(summary)
    try:
        plot_accuracy(folder.path)
    except DataError as error:  # not a failure: the run has ended and its results are written
        write_stream(f"accuracy.png was not drawn: {error}\n")
    write_stream(summary_text(summary, breakdown=breakdown) + "\n")
