"""How a role's error reaches the end of the run: one line of text in a file of its own."""

import contextlib
import sys
import traceback
from pathlib import Path

from speed_async.errors import ConfigError, LostRun, RoleError, SpeedAsyncError
from speed_async.launcher.logs import logged_as
from speed_async.observability.first_error import one_line
from speed_async.observability.summary import resume_command

MAX_CHARS = 2000
"""Of an error that was not foreseen: some libraries list all that they know."""
EXIT_FAILED = 1
EXIT_NOTHING_LEARNED = 3
"""All updates were made, and not one had a gradient to follow."""
EXIT_LOST_RUN = 69
"""This node has lost the run: nobody answers for it any more."""
EXIT_GIVEN_UP = 75
"""An actor given up as lost, or without whole weights: its supervisor starts another."""
EXIT_INTERRUPTED = 130
"""Stopped by a signal, in order: with a checkpoint and a summary."""
EXIT_STATUS = {
    "completed": 0,
    "stopped": EXIT_INTERRUPTED,
    "nothing_learned": EXIT_NOTHING_LEARNED,
    "failed": EXIT_FAILED,
}
"""By the outcome of a run (observability/metrics.py)."""


def exit_status(error: BaseException) -> int:
    return EXIT_LOST_RUN if isinstance(error, LostRun) else EXIT_FAILED


def describe(role: str, error: BaseException) -> str:
    """One paragraph for the user; a stack trace only where the error was not foreseen."""
    if isinstance(error, RoleError | ConfigError):
        return str(error)
    if isinstance(error, SpeedAsyncError):
        return f"{role}: {error}"
    return f"{role}: unexpected {type(error).__name__}: {one_line(str(error), MAX_CHARS)}"


def record(path: Path, role: str, error: BaseException) -> str:
    """Write the description for the parent, the trace to this process's own log."""
    with logged_as("ERROR"):
        traceback.print_exception(error, file=sys.stderr)
    text = describe(role, error)
    with contextlib.suppress(OSError):  # no room: the exit status still says it
        path.write_text(text)
    return text


def recorded(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def to_go_on(run_folder: Path | str) -> str:
    """What resumes this run."""
    return f"to go on: {resume_command(str(run_folder))}"


def ended_elsewhere(outcome: str) -> str:
    """The last line on a node without the learner; `outcome` is empty where nobody told."""
    how = outcome.replace("_", " ") or "its learner's node says how"
    return f"the run has ended on node 0: {how}\n"
