"""One attempt of a run: from a start, a resume or a restart of its ranks until they exit.

Rank 0 begins the attempt. Its process holds the lock of the run folder and assigns the attempt
number, which increases with each attempt and distinguishes its peers from those of earlier ones.
A later attempt binds the ports of the previous one if they are free, so that joined actors and
consoles reconnect to the service.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from speed_async.config.load import save_config
from speed_async.config.local_model import model_folder
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
from speed_async.learner.checkpoint.store import FoundCheckpoint, latest_valid
from speed_async.observability.notation import counted

LOCK_GRACE_S = 5.0
"""How long a restarted attempt waits for the lock: the kernel may still be ending the previous
process."""
PORT_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """Ports that the service binds or has bound; 0 means any free port."""

    service: int = 0
    feed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    number: int
    """0 for the first of a run."""
    config: Config
    folder: RunFolder
    checkpoint: FoundCheckpoint | None
    """The checkpoint to continue from; None starts from the initial model."""
    identity: Identity | None
    """Identity of the run's inputs, as far as it was read; None on the first attempt."""
    ports: Ports
    lock: int
    """An open descriptor; closing it, or the end of this process, releases the lock."""

    def write_identity(self) -> Identity:
        """Compute and save the identity of the run's inputs; must precede any generation. Raises
        SpeedAsyncError or OSError."""
        identity = self.identity or identify(self.config, run_id=new_run_id())
        self.folder.write(self.folder.identity, identity.text())
        return identity

    def add_weights(self, identity: Identity) -> None:
        """Add digests of all weights while the run starts: reading them takes time. If this fails,
        a resume compares only samples of the weights."""
        if WEIGHTS in identity.things:
            return
        try:
            whole = with_weights(identity, model_folder(self.config.model.path))
            self.folder.write(self.folder.identity, whole.text())
        except (SpeedAsyncError, OSError) as error:
            sys.stderr.write(f"no digest of the model's weights was saved: {error}\n")

    def resume_banner(self) -> list[str]:
        """Lines that announce a resumed run; empty on the first attempt."""
        if self.number == 0:
            return []
        folder = self.checkpoint.folder if self.checkpoint else None
        origin = folder.name if folder else "its start"
        notices = self.checkpoint.notices if self.checkpoint else ()
        lines = [*notices, f"resuming {self.folder.path} from {origin} (attempt {self.number})"]
        return [f"{line}\n" for line in lines]


def begin_attempt(config: Config, *, restarted_in: Path | None, resume: bool) -> Attempt:
    """Lock the run folder and read its state.

    `restarted_in`: the run folder of ranks that were restarted; the run continues there with its
    own configuration. With `resume` it continues in `run.folder`. Otherwise a new folder is
    created. Raises RunFinished when the run is already complete, or SpeedAsyncError.
    """
    if restarted_in is not None:
        num_actors = config.cluster.actors
        config = load_resumed(restarted_in)
        cluster = config.cluster.model_copy(update={"actors": num_actors})
        config = config.model_copy(update={"cluster": cluster})
    continues = resume or restarted_in is not None
    if continues:
        folder = RunFolder(path=Path(config.run.folder))
    else:
        folder, config = make_run_folder(config)
    lock = folder.take_lock(LOCK_GRACE_S if restarted_in is not None else 0.0)
    checkpoint, identity = None, None
    try:
        if continues:
            _refuse_finished(config, folder)
            identity = check_identity(config, folder)
            checkpoint = latest_valid(folder.checkpoints, config.learner.keep_last)
            save_config(config, folder.config)
        number = _next_number(folder, continues=continues)
        ports = _previous_ports(config, folder) if continues else Ports()
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
    """Check, before any rank is started, that `run.folder` can be resumed. Changes nothing.

    Raises SpeedAsyncError, or RunFinished when the run is already complete.
    """
    folder = RunFolder(path=Path(config.run.folder))
    folder.release_lock(folder.take_lock(0.0))
    _refuse_finished(config, folder)
    check_identity(config, folder)


def _refuse_finished(config: Config, folder: RunFolder) -> None:
    """Raise RunFinished when the summary records completion and no limit was raised since. A run
    that died between its last checkpoint and its summary is not finished."""
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
            f"it has completed its {counted(updates, 'update')}; to continue training, set a "
            "larger --run.updates"
        )
    elif completed and accuracy is not None and target is not None and accuracy >= target:
        how = (
            f"accuracy {accuracy:.3f} was reached at version {version}; to continue training, set "
            "a higher --run.stop_at_accuracy"
        )
    if how and learned_nothing:
        how += f" (its outcome: {summary.get('reason')})"
    if how:
        raise RunFinished(f"the run in '{folder.path}' is finished: {how}")


def recorded_outcome(path: Path) -> str:
    """Outcome of the run in this folder according to its summary."""
    try:
        return str(json.loads(RunFolder(path=path).summary.read_text())["outcome"])
    except (OSError, ValueError, TypeError, KeyError):
        return "completed"


def save_ports(attempt: Attempt, ports: Ports) -> None:
    """Save the ports for the next attempt. Raises OSError."""
    host = attempt.config.cluster.host
    address = {"host": host, "port": ports.service, "feed_port": ports.feed}
    attempt.folder.write(attempt.folder.address, json.dumps(address) + "\n")


def _next_number(folder: RunFolder, *, continues: bool) -> int:
    """Assign the attempt number; it is saved before it is used."""
    number = 1 if continues else 0
    if folder.attempt.is_file():
        try:
            number = int(json.loads(folder.attempt.read_text())["attempt"]) + 1
        except (ValueError, TypeError, KeyError) as error:
            raise SpeedAsyncError(
                f"'{folder.attempt}' is damaged ({error}): write {{\"attempt\": N}} to it, with N "
                "greater than every attempt number in logs/learner.log"
            ) from None
    folder.write(folder.attempt, json.dumps({"attempt": number}) + "\n")
    return number


def _previous_ports(config: Config, folder: RunFolder) -> Ports:
    """Ports of the previous attempt that the configuration does not set and that are free."""
    try:
        address = json.loads(folder.address.read_text())
        host, port, feed_port = address["host"], int(address["port"]), int(address["feed_port"])
    except (OSError, ValueError, TypeError, KeyError):
        return Ports()
    cluster = config.cluster
    if host != cluster.host:
        return Ports()
    reuse_service = not cluster.service_port and becomes_free(host, port, timeout_s=PORT_GRACE_S)
    reuse_feed = not cluster.feed_port and becomes_free(host, feed_port, timeout_s=PORT_GRACE_S)
    return Ports(service=port if reuse_service else 0, feed=feed_port if reuse_feed else 0)
