"""Exit statuses, and error files: each role reports its error as one line in its own file."""

import contextlib
import sys
import traceback
from pathlib import Path

from speed_async.errors import ConfigError, RoleError, RunLost, SpeedAsyncError
from speed_async.launcher.logs import logged_as
from speed_async.observability.first_error import one_line
from speed_async.observability.summary import resume_command

MAX_CHARS = 2000
"""Limit for the text of an unexpected error: some libraries produce very long messages."""
EXIT_FAILED = 1
EXIT_NOTHING_LEARNED = 3
"""All updates were completed, and none had a nonzero gradient."""
EXIT_RUN_LOST = 69
"""The service of the run is not reachable from this node any more."""
EXIT_INCARNATION_LOST = 75
"""An actor was declared lost, or has incomplete weights: its supervisor restarts it."""
EXIT_INTERRUPTED = 130
"""Stopped by a signal after writing a checkpoint and a summary."""
EXIT_STATUS = {
    "completed": 0,
    "stopped": EXIT_INTERRUPTED,
    "nothing_learned": EXIT_NOTHING_LEARNED,
    "failed": EXIT_FAILED,
}
"""Exit status by outcome of the run (observability/metrics.py)."""


def exit_status(error: BaseException) -> int:
    return EXIT_RUN_LOST if isinstance(error, RunLost) else EXIT_FAILED


def describe(role: str, error: BaseException) -> str:
    """One paragraph for the user, without a traceback."""
    if isinstance(error, RoleError | ConfigError):
        return str(error)
    if isinstance(error, SpeedAsyncError):
        return f"{role}: {error}"
    return f"{role}: unexpected {type(error).__name__}: {one_line(str(error), MAX_CHARS)}"


def record(path: Path, role: str, error: BaseException) -> str:
    """Write the description to the error file for the parent, and the traceback to the log."""
    with logged_as("ERROR"):
        traceback.print_exception(error, file=sys.stderr)
    text = describe(role, error)
    with contextlib.suppress(OSError):  # disk full: the exit status still reports the failure
        path.write_text(text)
    return text


def recorded(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def resume_hint(run_folder: Path | str) -> str:
    """The command that resumes this run."""
    return f"to resume: {resume_command(str(run_folder))}"


def remote_end_line(outcome: str) -> str:
    """The last line on a node without the learner; `outcome` is empty when it is not known."""
    how = outcome.replace("_", " ") or "see its output for the outcome"
    return f"the run has ended on node 0: {how}\n"
