"""Logs of the roles: every line has its time and level, and a full disk ends nobody."""

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
    # Progress bars of transformers, huggingface_hub, vLLM and whatever else draws them by tqdm.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Environment of processes whose stderr is a log."""
STAMPED = re.compile(r"(?:\(.*?pid=\d+\) )?(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:")
"""A line of vLLM's, which has both."""


def log_to(path: Path) -> None:
    """From here on, whatever this process or its libraries write to stderr goes to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    with path.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    log_stderr()


def log_stderr() -> None:
    """Standard error is a log: from here on its lines have time and level, and writing to it
    raises nothing. Records of `logging` and warnings go there as well."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    raw = os.fdopen(sys.stderr.fileno(), "wb", buffering=0, closefd=False)
    # Unbuffered: what did not fit once must not be tried again before every later line.
    sys.stderr = Log(raw, errors="backslashreplace", write_through=True)
    logging.captureWarnings(True)
    logging.getLogger().handlers = [_Handler()]


@contextlib.contextmanager
def logged_as(level: str) -> Iterator[None]:
    """What is written to stderr inside is of this level, where stderr is a log."""
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
    """Puts time and level before every line, and loses what there is no room for."""

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
        goes_on, self._is_within_line = self._is_within_line, False
        return line if goes_on or STAMPED.match(line) else head + line


class _Handler(logging.Handler):
    """Records that reach the root logger, with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        with logged_as(record.levelname):
            sys.stderr.write(f"{record.name}: {self.format(record)}\n")
