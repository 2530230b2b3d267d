"""Keyboard input from the terminal: single keys without echo. Terminal modes are restored."""

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
    """Reads single keys from the terminal on standard input.

    Ctrl-C and Ctrl-Z still send signals to the foreground processes of the terminal. The terminal
    is used only while this process, or its nearest ancestor with this controlling terminal, is in
    the foreground. (The console of a run has its own session, so that Ctrl-C does not end it; the
    command that started the run is the ancestor.)
    """

    def __init__(self) -> None:
        self._descriptor = _terminal()
        self._owner: int | None = None
        """Process id of that ancestor; None if the terminal controls this process."""
        self._modes: Modes | None = None
        """Modes to restore."""
        self._handler: Any = None

    def __enter__(self) -> "Keyboard":
        if self._descriptor is not None:
            self._owner = _controlled_ancestor(self._descriptor)
            # A read from the background then fails instead of stopping the process.
            self._handler = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
            self.enable()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()
        if self._handler is not None:
            signal.signal(signal.SIGTTIN, self._handler)

    @property
    def is_available(self) -> bool:
        """Whether keys can be read at all."""
        return self._descriptor is not None and self._owner != NO_PROCESS

    @property
    def is_background(self) -> bool:
        """Whether this process is a background job of the terminal."""
        return self.is_available and not self._is_foreground()

    def enable(self) -> None:
        """Set single-key mode in the foreground; call again after a shell reset the modes."""
        if self._descriptor is None or not self._is_foreground():
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
        """Keys pressed since the last call; empty in the background."""
        if self._descriptor is None or not self._is_foreground():
            return ""
        self.enable()
        keys = b""
        with suppress(OSError):  # the terminal was lost meanwhile
            while select.select([self._descriptor], [], [], 0)[0]:
                chunk = os.read(self._descriptor, 64)
                if not chunk:  # hung up
                    self._descriptor = None
                    break
                keys += chunk
        return keys.decode(errors="ignore")

    def restore(self) -> None:
        """Restore the terminal modes, unless this process is in the background."""
        modes, self._modes = self._modes, None
        if modes is not None and self._descriptor is not None and self._is_foreground():
            with suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSANOW, modes)

    def _is_foreground(self) -> bool:
        assert self._descriptor is not None
        if self._owner is None:
            return _in_foreground(self._descriptor)
        status = _status_of(self._owner)
        return status is not None and status.group == status.foreground


@contextmanager
def preserve_terminal() -> Iterator[None]:
    """Restore terminal modes and cursor on exit, because a killed console cannot restore them."""
    descriptor = _terminal()
    modes = termios.tcgetattr(descriptor) if descriptor is not None else None
    try:
        yield
    finally:
        if descriptor is not None and modes is not None and _in_foreground(descriptor):
            with suppress(OSError, termios.error):
                if termios.tcgetattr(descriptor) != modes:
                    termios.tcsetattr(descriptor, termios.TCSANOW, modes)
                    os.write(descriptor, SHOW_CURSOR)


NO_PROCESS = 0
"""Instead of a process id: the terminal controls no ancestor."""


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


def _in_foreground(descriptor: int) -> bool:
    """Whether this process is in the foreground of this terminal."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # the terminal does not control this process
        return False


def _controlled_ancestor(descriptor: int) -> int | None:
    """Nearest ancestor controlled by the terminal.

    None if the terminal controls this process; NO_PROCESS if it controls no ancestor.
    """
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
    return NO_PROCESS
