"""Find the root error in a log that several processes write to, as one line.

Engine processes write tracebacks to stderr, which is the log of the parent process. The parent
process itself only learns that a child failed, so the error message is extracted from the log.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

OWN_LOG = Path("/proc/self/fd/2")
"""stderr of this process."""
MAX_BYTES = 4 * 1024 * 1024
"""Maximum bytes of a log to read."""
MAX_CHARS = 400
MAX_LINES = 4
"""Maximum lines of one error message."""
_PREFIX = re.compile(
    r"(\([\w .-]+ pid=\d+\) )?((?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [-\d]+ [:\d]+ \[[^\]]+\] ?)?"
)
"""Prefix of vLLM log lines: process, level, time, source location."""
_TRACEBACK = "Traceback (most recent call last):"
_ELSEWHERE = re.compile(r"(?i)see (the )?(root cause|stack trace)|check the stack trace")


class LogSince:
    """The part of a log written after construction; empty if stderr is not a file."""

    def __init__(self, path: Path = OWN_LOG) -> None:
        self._path = path
        self._start = _size(path)

    def first_error(self) -> str:
        """The root error as one line; "" if there is none."""
        if _size(self._path) <= self._start:
            return ""
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                return first_error(file.read(MAX_BYTES).decode(errors="replace"))
        except OSError:
            return ""


def first_error(log: str) -> str:
    """Message of the first traceback, skipping errors that only refer to another one."""
    lines = [_split(line) for line in log.splitlines()]
    return next((error for error in _errors(lines) if not is_secondary_error(error)), "")


def is_secondary_error(error: str) -> bool:
    """Whether this error only reports that another process failed."""
    return _ELSEWHERE.search(error) is not None


def one_line(text: str, max_chars: int = MAX_CHARS) -> str:
    """Join lines and truncate the text to `max_chars`."""
    joined = " ".join(text.split())
    return joined if len(joined) <= max_chars else joined[: max_chars - 3] + "..."


def _errors(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    for index, (prefix, body) in enumerate(lines):
        if body.strip() == _TRACEBACK:
            yield one_line(" ".join(_message(prefix, lines[index + 1 :])))


def _message(prefix: str, lines: Sequence[tuple[str, str]]) -> list[str]:
    """Error message of the traceback in `lines`, skipping the lines of other processes."""
    message: list[str] = []
    for other, body in lines:
        if other != prefix:
            if message:
                break
        elif not message:
            if body.strip() and not body[0].isspace():  # frames are indented
                message.append(body)
        elif not body.strip() or body.startswith(_TRACEBACK) or len(message) == MAX_LINES:
            break
        else:
            message.append(body)
    return message


def _split(line: str) -> tuple[str, str]:
    """Split a line into log prefix and body."""
    match = _PREFIX.match(line)
    end = match.end() if match else 0
    return line[:end], line[end:]


def _size(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
