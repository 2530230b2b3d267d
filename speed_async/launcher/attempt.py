"""One life of a run: from a start, a resume, or a restart of its ranks, to their end.

The leading learner begins it. It holds the run folder's lock for as long as its process lives, and
gives the life its number, which grows with each: by it, nobody of an earlier life is taken for one
of this. A later life binds the ports of the one before where it can, so that actors which joined by
themselves, and consoles, find the service again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.load import save_config
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import RunFinished, SpeedAsyncError
from speed_async.launcher.identity.check import check_identity
from speed_async.launcher.identity.identity import (
    WEIGHTS,
    Identity,
    identify,
    new_run_id,
    with_weights,
)
from speed_async.launcher.ports import becomes_free
from speed_async.launcher.run_folder import RunFolder, make_run_folder
from speed_async.learner.checkpoint.store import Found, latest_valid
from speed_async.observability.notation import counted

LOCK_GRACE_S = 5.0
"""How long a new life waits for the one before to let go: the kernel may still be ending it."""
PORT_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """What the service is to bind, or has bound; 0 is any free port."""

    service: int = 0
    feed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    number: int
    """0 for the first of a run."""
    config: Config
    folder: RunFolder
    checkpoint: Found | None
    """What is gone on from; None starts from the run's first model."""
    identity: Identity | None
    """What the run stands on, as far as it was read; None at its first start."""
    ports: Ports
    lock: int
    """An open descriptor; the lock goes when it is closed, at the latest with this process."""

    def identified(self) -> Identity:
        """What the run stands on, written down: it has to be before anything is generated. Raises
        SpeedAsyncError or OSError."""
        identity = self.identity or identify(self.config, run_id=new_run_id())
        self.folder.write(self.folder.identity, identity.text())
        return identity

    def add_weights(self, identity: Identity) -> None:
        """Complete it while the run begins: whole weights take a while to be read. Where that
        fails, a resume compares samples of them alone."""
        if WEIGHTS in identity.things:
            return
        try:
            whole = with_weights(identity, Path(self.config.model.path))
            self.folder.write(self.folder.identity, whole.text())
        except (SpeedAsyncError, OSError) as error:
            sys.stderr.write(f"the model's weights were not identified: {error}\n")

    def resume_banner(self) -> list[str]:
        """Lines that tell the user of a run that goes on; none at its first start."""
        if self.number == 0:
            return []
        folder = self.checkpoint.folder if self.checkpoint else None
        place = folder.name if folder else "its start"
        notices = self.checkpoint.notices if self.checkpoint else ()
        words = [*notices, f"resuming {self.folder.path} from {place} (life {self.number})"]
        return [f"{line}\n" for line in words]


def begin_attempt(config: Config, *, begun_in: Path | None, resume: bool) -> Attempt:
    """Take the run folder and see what is in it.

    `begun_in`: where these ranks' run began, when they were started again; it goes on there, with
    the configuration it has. With `resume` it goes on in `run.folder`. Otherwise a new folder is
    made. Raises RunFinished when the run that is there has nothing left to do, or SpeedAsyncError.
    """
    if begun_in is not None:
        num_actors = config.cluster.actors
        config = load_resumed(begun_in)
        cluster = config.cluster.model_copy(update={"actors": num_actors})
        config = config.model_copy(update={"cluster": cluster})
    goes_on = resume or begun_in is not None
    if goes_on:
        folder = RunFolder(path=Path(config.run.folder))
    else:
        folder, config = make_run_folder(config)
    lock = folder.take_lock(LOCK_GRACE_S if begun_in is not None else 0.0)
    checkpoint, identity = None, None
    try:
        if goes_on:
            refuse_finished(config, folder)
            identity = check_identity(config, folder)
            checkpoint = latest_valid(folder.checkpoints, config.learner.keep_last)
            save_config(config, folder.config)
        number = _next_number(folder, goes_on=goes_on)
        ports = _ports(config, folder) if goes_on else Ports()
    except BaseException:
        folder.release_lock(lock)
        raise
    return Attempt(
        number=number,
        config=config,
        folder=folder,
        checkpoint=checkpoint,
        identity=identity,
        ports=ports,
        lock=lock,
    )


def check_resumable(config: Config) -> None:
    """Raise SpeedAsyncError, before any rank is started, when `run.folder` cannot be resumed, and
    RunFinished when it need not be. Changes nothing."""
    folder = RunFolder(path=Path(config.run.folder))
    folder.release_lock(folder.take_lock(0.0))
    refuse_finished(config, folder)
    check_identity(config, folder)


def refuse_finished(config: Config, folder: RunFolder) -> None:
    """Raise RunFinished for a run whose summary says that it came to its end, where no limit has
    been raised since. One that died between its last checkpoint and its summary did not."""
    try:
        summary = json.loads(folder.summary.read_text())
        completed, version = bool(summary["completed"]), int(summary["policy_version"])
        accuracy = summary["accuracy_reached"]
        learned_nothing = summary.get("outcome") == "nothing_learned"
    except (OSError, ValueError, TypeError, KeyError):
        return
    updates, target, how = config.run.updates, config.run.stop_at_accuracy, ""
    if completed and version >= updates:
        how = (
            f"it has made its {counted(updates, 'update')}; to train on, add a larger --run.updates"
        )
    elif completed and accuracy is not None and target is not None and accuracy >= target:
        how = (
            f"accuracy {accuracy:.3f} was reached at version {version}; to train on, add a higher "
            "--run.stop_at_accuracy"
        )
    if how and learned_nothing:
        how += f" (it ended so: {summary.get('reason')})"
    if how:
        raise RunFinished(f"the run in '{folder.path}' is finished: {how}")


def recorded_outcome(path: Path) -> str:
    """How the run in this folder ended, by its summary."""
    try:
        return str(json.loads(RunFolder(path=path).summary.read_text())["outcome"])
    except (OSError, ValueError, TypeError, KeyError):
        return "completed"


def remember_ports(life: Attempt, ports: Ports) -> None:
    """For the next life. Raises OSError."""
    address = {"host": life.config.cluster.host, "port": ports.service, "feed_port": ports.feed}
    life.folder.write(life.folder.address, json.dumps(address) + "\n")


def _next_number(folder: RunFolder, *, goes_on: bool) -> int:
    """Written down before anything bears it."""
    number = 1 if goes_on else 0
    if folder.life.is_file():
        try:
            number = int(json.loads(folder.life.read_text())["life"]) + 1
        except (ValueError, TypeError, KeyError) as error:
            raise SpeedAsyncError(
                f"'{folder.life}' is damaged ({error}): write {{\"life\": N}} there, N greater "
                "than any life that logs/learner.log tells of"
            ) from None
    folder.write(folder.life, json.dumps({"life": number}) + "\n")
    return number


def _ports(config: Config, folder: RunFolder) -> Ports:
    """Those of the life before, where the configuration leaves them open and they can be had."""
    try:
        address = json.loads(folder.address.read_text())
        host, port, feed_port = address["host"], int(address["port"]), int(address["feed_port"])
    except (OSError, ValueError, TypeError, KeyError):
        return Ports()
    cluster = config.cluster
    if host != cluster.host:
        return Ports()
    service_is_ours = not cluster.service_port and becomes_free(host, port, timeout_s=PORT_GRACE_S)
    feed_is_ours = not cluster.feed_port and becomes_free(host, feed_port, timeout_s=PORT_GRACE_S)
    return Ports(service=port if service_is_ours else 0, feed=feed_port if feed_is_ours else 0)
