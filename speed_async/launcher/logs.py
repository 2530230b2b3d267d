"""Logs of the roles. Every line has a time and a level; a full disk raises no error."""

import contextlib
import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

QUIET = {
    # Progress bars of transformers, huggingface_hub, vLLM and other users of tqdm.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Environment variables of processes whose stderr is a log."""
STAMPED = re.compile(r"(?:\(.*?pid=\d+\) )?(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:")
"""Matches a line of vLLM's log, which already has a time and a level."""


def log_to(path: Path) -> None:
    """Redirect stderr of this process, including its libraries, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    with path.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    log_stderr()


def log_stderr() -> None:
    """Treat stderr as a log: its lines get a time and a level, and writing to it never raises.
    Records of `logging` and Python warnings are written to it as well."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    raw = os.fdopen(sys.stderr.fileno(), "wb", buffering=0, closefd=False)
    # Unbuffered: text that failed to be written is dropped, not retried before each later line.
    sys.stderr = Log(raw, errors="backslashreplace", write_through=True)
    logging.captureWarnings(True)
    logging.getLogger().handlers = [_Handler()]


@contextlib.contextmanager
def logged_as(level: str) -> Iterator[None]:
    """Set the level of lines written to stderr within this context, if stderr is a log."""
    log = sys.stderr
    if not isinstance(log, Log):
        yield
        return
    before, log.level = log.level, level
    try:
        yield
    finally:
        log.level = before


class Log(io.TextIOWrapper):
    """Prefixes every line with time and level; drops text that cannot be written."""

    level = "INFO"
    _is_within_line = False

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(self._stamped(text))
            super().flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def _stamped(self, text: str) -> str:
        if not text:
            return ""
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.level:<7} "
        *lines, rest = text.split("\n")
        whole = [self._stamp(line, head) + "\n" for line in lines]
        last = self._stamp(rest, head) if rest else ""
        self._is_within_line = bool(rest)
        return "".join(whole) + last

    def _stamp(self, line: str, head: str) -> str:
        continues, self._is_within_line = self._is_within_line, False
        return line if continues or STAMPED.match(line) else head + line


class _Handler(logging.Handler):
    """Writes records of the root logger to stderr with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        with logged_as(record.levelname):
            sys.stderr.write(f"{record.name}: {self.format(record)}\n")
