"""Handling of closed, full or broken standard streams: they neither end nor block a run."""

import os
import sys
import threading

STDOUT, STDERR = 1, 2
WRITE_DEADLINE_S = 10.0
"""How long a write waits for a reader that does not read."""


def open_standard_streams() -> None:
    """Open /dev/null in place of a closed standard input, output or error (`>&-`).

    Otherwise the next file or socket would get the free descriptor, and printed text would be
    written to it.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened <= 2:
        os.set_inheritable(opened, True)
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (it stays open)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def write_stream(text: str, stream: int = STDOUT) -> bool:
    """Write to a standard stream. Returns False if the reader is gone (`| head -1`) or too slow.
    This is not an error: everything written here is also on disk."""
    is_written = threading.Event()

    def write() -> None:
        left = memoryview(text.encode(errors="backslashreplace"))
        try:
            while left:
                left = left[os.write(stream, left) :]
        except OSError:
            return
        is_written.set()

    # In a thread and not through sys.stdout: a write that blocks forever must not hold a lock that
    # the exit of this process needs.
    writing = threading.Thread(target=write, name="write", daemon=True)
    writing.start()
    writing.join(WRITE_DEADLINE_S)
    return is_written.is_set()


def discard_stdout() -> None:
    """Redirect stdout to /dev/null after its reader is gone, so that the flush at exit succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
