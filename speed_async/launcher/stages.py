"""What a command is at before the run's feed begins, with times, for people at a terminal."""

import os
import sys
import time

BEGAN = "SPEED_ASYNC_BEGAN"
"""When the command was given, in seconds since 1970; set for all processes that it starts."""


def begin() -> None:
    os.environ[BEGAN] = repr(time.time())


def stage(text: str) -> None:
    """A line on the terminal that standard error is; nothing where it is none."""
    if not sys.stderr.isatty():
        return
    try:
        elapsed_s = time.time() - float(os.environ[BEGAN])
    except (KeyError, ValueError):  # started by torchrun
        sys.stderr.write(f"{text}\n")
    else:
        sys.stderr.write(f"{max(0.0, elapsed_s):5.1f} s  {text}\n")
    sys.stderr.flush()
