"""Reading from pseudo-terminals."""

import fcntl
import os
import select
import signal
import termios
import time


def take_terminal() -> None:
    """In the child: make standard input the controlling terminal of its new session."""
    # Background jobs of a shell ignore SIGINT, and children inherit this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(descriptor: int, awaited: bytes, *, deadline_s: float) -> bytes:
    output = b""
    end_s = time.monotonic() + deadline_s
    while awaited not in output:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end_s - time.monotonic()))
        assert ready, f"{awaited!r} was not received within {deadline_s} s: {output!r}"
        output += os.read(descriptor, 65536)
    return output
