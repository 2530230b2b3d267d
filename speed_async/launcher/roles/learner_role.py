"""The first learner rank: starts the service and the console, trains, and writes the summary.

waits for  the service's ports, the service's messages (learner/loop.py), the children's ends
"""

import asyncio
import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speed_async.config.schema import Config
from speed_async.errors import DataError, RoleError, RunFinished, SpeedAsyncError
from speed_async.launcher.attempt import Attempt, begin_attempt, recorded_outcome, remember_ports
from speed_async.launcher.exit_status import describe, to_go_on
from speed_async.launcher.identity.identity import Identity
from speed_async.launcher.logs import log_to
from speed_async.launcher.ports import address_at
from speed_async.launcher.processes import end_process, start_role
from speed_async.launcher.rank import Rank
from speed_async.launcher.rendezvous import RendezvousRecord, node_rendezvous
from speed_async.launcher.roles.service_process import ServiceProcess
from speed_async.launcher.roles.stopping import Stopping
from speed_async.launcher.run_folder import RunFolder
from speed_async.launcher.stages import stage
from speed_async.launcher.standard_streams import STDERR, tell
from speed_async.observability.report import plot_accuracy, summary_text
from speed_async.observability.summary import resume_line
from speed_async.transport import messages as m
from speed_async.transport.curve import client_keys
from speed_async.transport.session import SessionLink
from speed_async.transport.tracing import with_tracing
from speed_async.transport.zeromq import open_link

if TYPE_CHECKING:
    from speed_async.learner.inbox import Stop
    from speed_async.learner.loop import Finished

ROLE = "learner"
CHILD_GRACE_S = 5.0
"""After the last message, service and console end by themselves within this."""
UPLOAD_GRACE_S = 60.0
"""The same where wandb may still have to upload."""
FAILED_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceAddress:
    host: str
    port: int
    feed_port: int


async def lead_run(config: Config, rank: Rank, *, resume: bool) -> str:
    """One life of a run, seen from its first rank: of a new one, or (`resume`, and after a restart
    of the ranks) of one that was begun before.

    Returns its outcome (observability/metrics.py); one that failed raises.
    """
    stopping = Stopping()
    stopping.listen()
    # The launcher decides how many actors there are, whatever the file says.
    num_actors = rank.world_size - config.cluster.learners
    cluster = config.cluster.model_copy(update={"actors": num_actors})
    config = config.model_copy(update={"cluster": cluster})
    notice = node_rendezvous()
    begun_in = Path(noted) if (noted := notice.read().run_folder) else None
    notice.write(RendezvousRecord(run_folder=noted))  # nobody serves yet
    try:
        life = await asyncio.to_thread(begin_attempt, config, begun_in=begun_in, resume=resume)
    except RunFinished as finished:
        notice.change(nothing_to_do=True)
        tell(f"{finished}\n")
        # Ranks that were started again after the end, and not by a person, end as the run did.
        return recorded_outcome(begun_in) if begun_in is not None else "completed"
    wanted = config.run.folder
    config, folder = life.config, life.folder
    notice.change(run_folder=str(folder.path))
    if life.number == 0 and folder.path.name != Path(wanted).name:
        text = f"'{wanted}' holds a run; this new one is in '{folder.path}' ({to_go_on(wanted)})\n"
        tell(text, STDERR)
    tell("".join(life.resume_banner()), STDERR)  # on the terminal: nothing is drawn there yet
    stage(f"run folder {folder.path}; starting the service")
    log_to(folder.log(ROLE))
    sys.stderr.writelines([f"life {life.number}\n", *life.resume_banner()])
    identifying = asyncio.create_task(asyncio.to_thread(life.identified), name="identity")
    service = ServiceProcess(config, folder, life=life.number)
    await service.start(life.ports)
    console: asyncio.subprocess.Process | None = None
    watch: asyncio.Task[None] | None = None
    grace_s = FAILED_GRACE_S
    has_failed = True
    try:
        identity = await identifying  # before an actor can find the service, and be given work
        weighing = asyncio.create_task(asyncio.to_thread(life.add_weights, identity))
        remember_ports(life, service.ports)
        address = ServiceAddress(
            host=config.cluster.host,
            port=config.cluster.advertised_port or service.ports.service,
            feed_port=service.ports.feed,
        )
        sys.stderr.write(f"metrics feed at {address_at(address.host, address.feed_port)}\n")
        sys.stderr.write(f"actors join at {address_at(address.host, address.port)}\n")
        notice.change(host=address.host, port=address.port)
        console = await _start_console(address, folder)
        stopping.shown_by(console, folder)
        watch = asyncio.create_task(service.watch(), name="service")
        finished = await _train(life, identity, rank, address, stopping.asked, service, watch)
        has_failed = False
        stopping.over()
        await weighing
        grace_s = UPLOAD_GRACE_S if config.observe.wandb else CHILD_GRACE_S
    finally:
        if watch is not None:
            await asyncio.wait((watch,), timeout=grace_s)  # it ends by itself after its last word
            watch.cancel()
        await service.end(FAILED_GRACE_S)
        if console is not None:
            await end_process(console, grace_s)
        if has_failed:
            tell(f"{resume_line(str(folder.path))}\n")
    _write_results(finished, folder, breakdown=config.observe.breakdown)
    if stopping.asked.has_lost_launcher:
        text = f"the launcher of this run has died; {to_go_on(folder.path)}\n"
        sys.stderr.write(text)
        tell(text)
    if finished.save_error:
        raise RoleError(ROLE, finished.save_error)
    return finished.outcome


async def _start_console(address: ServiceAddress, folder: RunFolder) -> asyncio.subprocess.Process:
    arguments = ["--host", address.host, "--port", str(address.feed_port)]
    arguments += ["--config", str(folder.config), "--run-folder", str(folder.path)]
    log = folder.log("console")
    return await start_role("console", arguments, log=log, stdin=None, stdout=None)


async def _train(
    life: Attempt,
    identity: Identity,
    rank: Rank,
    address: ServiceAddress,
    stop: "Stop",
    service: ServiceProcess,
    watch: asyncio.Task[None],
) -> "Finished":
    """Train; a service that dies meanwhile ends it."""
    # Seconds to import, while the actors, which wait for the service alone, do the same.
    work = await asyncio.to_thread(
        importlib.import_module, "speed_async.launcher.roles.learner_work"
    )
    keys = client_keys(life.config.cluster)
    wire = await open_link(address.host, address.port, ROLE, keys=keys)
    link = SessionLink(with_tracing(wire, life.config.observe.trace, ROLE))
    training = asyncio.create_task(work.learn(life, rank, link, stop, identity), name=ROLE)
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
        "reason": finished.save_error or finished.reason,
        "outcome": "failed" if finished.save_error else finished.outcome,
        # Whether there is nothing left to resume for: all updates were made, and saved.
        "completed": finished.outcome != "stopped" and not finished.save_error,
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
    try:
        plot_accuracy(folder.path)
    except DataError as error:  # the run is over and its results are written: this is no failure
        tell(f"accuracy.png was not drawn: {error}\n")
    tell(summary_text(summary, breakdown=breakdown) + "\n")
