"""Keeps what is typed from being written into a picture that is drawn over itself."""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_echo() -> Iterator[None]:
    """Key presses (Enter, the `^C` of an interrupt) are not echoed inside; then all is as before.

    Does nothing where standard input is no terminal, or one this process must not touch: a
    background job that set its modes would be stopped.
    """
    descriptor = _own_terminal()
    if descriptor is None:
        yield
        return
    modes = termios.tcgetattr(descriptor)
    quiet = [*modes[:3], modes[3] & ~termios.ECHO, *modes[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        if _own_terminal() is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, modes)


def _own_terminal() -> int | None:
    """Standard input, where it is a terminal and this process is in its foreground."""
    try:
        descriptor = sys.stdin.fileno()
        return descriptor if os.tcgetpgrp(descriptor) == os.getpgrp() else None
    except (AttributeError, OSError, ValueError):  # no stdin, not a terminal, a closed one
        return None
