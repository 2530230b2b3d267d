"""Entry point of one rank: selects its role and runs it.

    torchrun --nproc-per-node 3 -m speed_async.launch CONFIG [--section.field value ...]
    torchrun --nproc-per-node 3 -m speed_async.launch --resume RUN_DIR [--section.field value ...]

Ranks below `cluster.learners` are learners, the first of which leads the run; every other rank
supervises an actor. A rank whose launcher dies drains, as on SIGTERM. An error is reported to the
launcher as one line in torchrun's error file.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from speed_async.config.load import load_config
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.event_loop import ending_in_time, run
from speed_async.launcher.exit_status import EXIT_STATUS, describe, exit_status
from speed_async.launcher.nccl_environment import nccl_environment
from speed_async.launcher.node_launcher import PROCESS_VARIABLE
from speed_async.launcher.preflight.findings import CHECKED
from speed_async.launcher.processes import die_with_parent
from speed_async.launcher.rank import Rank, check_world, reject_elastic
from speed_async.launcher.standard_streams import STDERR, write_stream

USAGE = "usage: torchrun ... -m speed_async.launch CONFIG|--resume RUN_DIR [--section.field value]"
RESUME = "--resume"
T = TypeVar("T")


def main(arguments: list[str]) -> int:
    """Return the rank's exit status: that of the run's outcome, 69 (run lost) or 1 (failed)."""
    role = "launch"
    # Until the role installs its own handlers, a signal ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.environ.get(PROCESS_VARIABLE)
    die_with_parent(int(launcher) if launcher else None, signal.SIGTERM)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise SpeedAsyncError(USAGE)
        rank = Rank.from_environment()
        reject_elastic()
        config, resume = _read_config(arguments)
        role = _role(config, rank)
        check_world(config, rank)
        if rank.rank == 0:
            _check_run(config, rank, resume=resume)
        return run_rank(config, rank, resume=resume)
    except Exception as error:  # boundary of the rank
        return _report(role, error)


def _role(config: Config, rank: Rank) -> str:
    learns = rank.rank < config.cluster.learners
    return f"{'learner' if learns else 'actor'}-{rank.rank}" if rank.rank else "learner"


def _report(role: str, error: Exception) -> int:
    """Report the error, with a traceback in the log if it is unexpected; return the status."""
    if not isinstance(error, SpeedAsyncError):
        traceback.print_exception(error)
    return fail(describe(role, error), exit_status(error))


def _read_config(arguments: list[str]) -> tuple[Config, bool]:
    """Return the configuration, and whether it belongs to a run that is resumed."""
    first, *rest = arguments
    if first == RESUME and rest:
        return load_resumed(Path(rest[0]), rest[1:]), True
    if first.startswith(f"{RESUME}="):
        return load_resumed(Path(first.partition("=")[2]), rest), True
    if first == RESUME:
        raise SpeedAsyncError(USAGE)
    return load_config(first, rest), False


def run_rank(config: Config, rank: Rank, *, resume: bool) -> int:
    if rank.rank < config.cluster.learners:
        return _run_learner(config, rank, resume=resume)
    from speed_async.launcher.roles.actor_rank import supervise_rank  # torch: seconds to import

    run(supervise_rank(config, rank))
    return 0


def _run_learner(config: Config, rank: Rank, *, resume: bool) -> int:
    os.environ.update(nccl_environment(config.weights.deadline_s))
    grace_s, role = config.cluster.drain_timeout_s, _role(config, rank)

    def run_in_time(main: Coroutine[Any, Any, T]) -> T:
        if config.cluster.learners == 1:  # no thread waits for another rank
            return run(main)
        return run(ending_in_time(main, grace_s=grace_s, end=partial(_report, role)))

    if rank.rank > 0:
        from speed_async.launcher.roles.follower_role import follow_run

        run_in_time(follow_run(config, rank))
        return 0
    from speed_async.launcher.roles.learner_role import lead_run

    return EXIT_STATUS[run_in_time(lead_run(config, rank, resume=resume))]


def fail(text: str, status: int) -> int:
    """Report the error to the launcher, which prints the first error of all ranks when it exits.

    Without a launcher the error is printed here.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        record = json.dumps({"message": text, "timestamp": int(time.time())})
        Path(error_file or "").write_text(record)
    except OSError:  # no error file is set, or it is not writable
        write_stream(f"error: {text}\n", STDERR)
    return status


def _check_run(config: Config, rank: Rank, *, resume: bool) -> None:
    """Run the preflight checks before the run folder is created. Raises SpeedAsyncError.

    Skipped when `speed-async train` or an earlier attempt has already run them.
    """
    if os.environ.get(CHECKED) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    from speed_async.launcher.preflight.checks import require_runnable

    warnings = require_runnable(config, rank, resume=resume)
    sys.stderr.writelines(f"warning: {warning}\n" for warning in warnings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
