"""Progress of a command on the terminal, with times, until the run's metrics feed starts."""

import os
import sys
import time

START_TIME_VARIABLE = "SPEED_ASYNC_BEGAN"
"""Environment variable with the start time of the command in seconds since 1970, inherited by all
processes that it starts."""


def record_start() -> None:
    os.environ[START_TIME_VARIABLE] = repr(time.time())


def log_stage(text: str) -> None:
    """Write a line to stderr if it is a terminal."""
    if not sys.stderr.isatty():
        return
    try:
        elapsed_s = time.time() - float(os.environ[START_TIME_VARIABLE])
    except (KeyError, ValueError):  # started by torchrun
        sys.stderr.write(f"{text}\n")
    else:
        sys.stderr.write(f"{max(0.0, elapsed_s):5.1f} s  {text}\n")
    sys.stderr.flush()
