"""Standard streams that are closed, full or broken: they end no run and hold none up."""

import os
import sys
import threading

STDOUT, STDERR = 1, 2
TELL_DEADLINE_S = 10.0
"""How long a reader that does not read is waited for."""


def open_standard_streams() -> None:
    """Put /dev/null where standard input, output or error is closed (`>&-`).

    The next file or socket would be given the free number, and be written to by whoever prints.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened <= 2:
        os.set_inheritable(opened, True)
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (it stays open)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def tell(text: str, stream: int = STDOUT) -> bool:
    """Write to a standard stream for whoever reads there; False when nobody does (`| head -1`), or
    not in time. What is told lies on disk as well, so that is no error."""
    told = threading.Event()

    def write() -> None:
        left = memoryview(text.encode(errors="backslashreplace"))
        try:
            while left:
                left = left[os.write(stream, left) :]
        except OSError:
            return
        told.set()

    # A thread, and not through sys.stdout: a write that waits for ever must hold nothing that the
    # end of this process needs.
    writing = threading.Thread(target=write, name="tell", daemon=True)
    writing.start()
    writing.join(TELL_DEADLINE_S)
    return told.is_set()


def forget_stdout() -> None:
    """Nobody reads there any more: what is left to be written must not fail as the process ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
