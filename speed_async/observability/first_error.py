"""The first real error in a log that several processes write to, as one line.

An engine's processes trace their errors to stderr, which is the log of the process that started
them; that one hears only that something failed. What it says to a person is found here.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

OWN_LOG = Path("/proc/self/fd/2")
"""This process's stderr, whatever file it is."""
MAX_BYTES = 4 * 1024 * 1024
"""Of a log that are read."""
MAX_CHARS = 400
MAX_LINES = 4
"""Of one error's message."""
_PREFIX = re.compile(
    r"(\([\w .-]+ pid=\d+\) )?((?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [-\d]+ [:\d]+ \[[^\]]+\] ?)?"
)
"""Of vLLM's loggers: process, level, time, place."""
_TRACEBACK = "Traceback (most recent call last):"
_ELSEWHERE = re.compile(r"(?i)see (the )?(root cause|stack trace)|check the stack trace")


class LogSince:
    """What is written to a log from here on; nothing where stderr is no file."""

    def __init__(self, path: Path = OWN_LOG) -> None:
        self._path = path
        self._start = _size(path)

    def first_error(self) -> str:
        """The first real error as one line; "" when there is none."""
        if _size(self._path) <= self._start:
            return ""
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                return first_error(file.read(MAX_BYTES).decode(errors="replace"))
        except OSError:
            return ""


def first_error(log: str) -> str:
    """What the first traceback ends in, but for errors that only point at another one."""
    lines = [_split(line) for line in log.splitlines()]
    return next((error for error in _errors(lines) if not points_elsewhere(error)), "")


def points_elsewhere(error: str) -> bool:
    """Whether this error says no more than that another process failed."""
    return _ELSEWHERE.search(error) is not None


def one_line(text: str, max_chars: int = MAX_CHARS) -> str:
    """Without line ends, and cut to what fits on a terminal."""
    joined = " ".join(text.split())
    return joined if len(joined) <= max_chars else joined[: max_chars - 3] + "..."


def _errors(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    for index, (prefix, body) in enumerate(lines):
        if body.strip() == _TRACEBACK:
            yield one_line(" ".join(_message(prefix, lines[index + 1 :])))


def _message(prefix: str, lines: Sequence[tuple[str, str]]) -> list[str]:
    """Of the traceback that goes on in these lines; other processes' lines stand among them."""
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
    """Prefix and what follows it."""
    match = _PREFIX.match(line)
    end = match.end() if match else 0
    return line[:end], line[end:]


def _size(path: Path) -> int:
    try:
        facts = os.stat(path)
    except OSError:
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0
