"""The terminal's keyboard: single keys, no echo, and the terminal's modes given back."""

import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

SHOW_CURSOR = b"\x1b[?25h"
Modes = list[Any]


class Keyboard:
    """Keys that are pressed in the terminal that standard input is, as they are pressed.

    Ctrl-C and Ctrl-Z still reach the terminal's foreground processes as signals. The terminal is
    touched and read only while it is ours to use: this process, or the nearest ancestor that the
    terminal controls, is in its foreground. (The console of a run is in a session of its own, so
    that Ctrl-C does not end it; the command that started the run stands in for it.)
    """

    def __init__(self) -> None:
        self._descriptor = _terminal()
        self._owner: int | None = None
        """Process id of that ancestor; None for this process."""
        self._modes: Modes | None = None
        """To be given back."""
        self._handler: Any = None

    def __enter__(self) -> "Keyboard":
        if self._descriptor is not None:
            self._owner = _controlled_ancestor(self._descriptor)
            # A read that comes just after the terminal was lost fails, and stops nobody.
            self._handler = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
            self.attend()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_back()
        if self._handler is not None:
            signal.signal(signal.SIGTTIN, self._handler)

    @property
    def is_there(self) -> bool:
        """Whether there is a keyboard to be read at all."""
        return self._descriptor is not None and self._owner != NOBODY

    @property
    def is_elsewhere(self) -> bool:
        """Whether the terminal is another's now: this is a background job."""
        return self.is_there and not self._is_ours()

    def attend(self) -> None:
        """Have the terminal give single keys, if it is ours; again after a shell had it."""
        if self._descriptor is None or not self._is_ours():
            return
        modes = termios.tcgetattr(self._descriptor)
        if not modes[3] & (termios.ECHO | termios.ICANON):
            return
        self._modes = modes
        characters = list(modes[6])
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        local = modes[3] & ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(
            self._descriptor, termios.TCSANOW, [*modes[:3], local, *modes[4:6], characters]
        )

    def pressed(self) -> str:
        """The keys pressed since the last call; empty while the terminal is another's."""
        if self._descriptor is None or not self._is_ours():
            return ""
        self.attend()
        keys = b""
        with suppress(OSError):  # it was lost meanwhile
            while select.select([self._descriptor], [], [], 0)[0]:
                chunk = os.read(self._descriptor, 64)
                if not chunk:  # hung up
                    self._descriptor = None
                    break
                keys += chunk
        return keys.decode(errors="ignore")

    def give_back(self) -> None:
        """The terminal's modes as they were, unless somebody else has it now."""
        modes, self._modes = self._modes, None
        if modes is not None and self._descriptor is not None and self._is_ours():
            with suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSANOW, modes)

    def _is_ours(self) -> bool:
        assert self._descriptor is not None
        if self._owner is None:
            return _holds(self._descriptor)
        status = _status_of(self._owner)
        return status is not None and status.group == status.foreground


@contextmanager
def terminal_kept() -> Iterator[None]:
    """The terminal's modes and its cursor are as before afterwards, whatever was done to them:
    a console that is killed cannot give them back."""
    descriptor = _terminal()
    modes = termios.tcgetattr(descriptor) if descriptor is not None else None
    try:
        yield
    finally:
        if descriptor is not None and modes is not None and _holds(descriptor):
            with suppress(OSError, termios.error):
                if termios.tcgetattr(descriptor) != modes:
                    termios.tcsetattr(descriptor, termios.TCSANOW, modes)
                    os.write(descriptor, SHOW_CURSOR)


NOBODY = 0
"""In place of a process id: no ancestor is controlled by the terminal."""


class _Status:
    """Process group, terminal, and the terminal's foreground group, from /proc/PID/stat."""

    def __init__(self, text: str) -> None:
        fields = text.rpartition(")")[2].split()
        self.parent, self.group = int(fields[1]), int(fields[2])
        number = int(fields[4])
        self.terminal = os.makedev((number >> 8) & 0xFFF, (number & 0xFF) | (number >> 12 & ~0xFF))
        self.foreground = int(fields[5])


def _status_of(process_id: int) -> _Status | None:
    try:
        return _Status(Path(f"/proc/{process_id}/stat").read_text())
    except (OSError, ValueError, IndexError):
        return None


def _terminal() -> int | None:
    """Standard input, where it is a terminal."""
    try:
        descriptor = sys.stdin.fileno()
        return descriptor if os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):  # no stdin, or a closed one
        return None


def _holds(descriptor: int) -> bool:
    """Whether this process is in the foreground of this terminal."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # it does not control this process
        return False


def _controlled_ancestor(descriptor: int) -> int | None:
    """None where this process is controlled by the terminal itself; NOBODY where none is."""
    try:
        os.tcgetpgrp(descriptor)
        return None
    except OSError:
        pass
    terminal, process_id = os.fstat(descriptor).st_rdev, os.getppid()
    while process_id > 0 and (status := _status_of(process_id)) is not None:
        if status.terminal == terminal:
            return process_id
        process_id = status.parent
    return NOBODY
