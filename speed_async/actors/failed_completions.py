"""Records completions that the verifier failed to score, for manual inspection.

Each completion is one JSON line with its prompt and the error. The records are diagnostic only:
when the disk is full or missing, records are dropped and counted, and the run continues.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from speed_async.types import Prompt

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Maximum file size per actor. Failures past this size are only counted."""
MAX_TEXT_CHARS = 100_000
"""Maximum length of one text. Longer texts are truncated and marked."""


class FailedCompletions:
    """Appends to `path`, which earlier incarnations of the same actor may have written."""

    def __init__(self, path: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.num_recorded = 0
        self.num_dropped = 0
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._lock = threading.Lock()

    def record(self, prompt: Prompt, errors: Sequence[tuple[str, str]]) -> None:
        """Write one record, atomically, for each completion and error. Blocks on disk I/O;
        thread-safe."""
        for completion, error in errors:
            self._record(
                {
                    "prompt_id": prompt.prompt_id,
                    "held_out": prompt.held_out,
                    "prompt": _truncate(prompt.text),
                    "completion": _truncate(completion),
                    "error": error,
                }
            )

    def _record(self, record: dict[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            try:
                is_written = self._append(line)
            except OSError:
                is_written = False
            self.num_recorded += is_written
            self.num_dropped += not is_written

    def _append(self, line: bytes) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if size + len(line) > self._max_file_bytes:
                return False
            try:
                is_complete = file.write(line) == len(line)
            except OSError:
                is_complete = False
            if not is_complete:  # the disk filled up during the write
                os.ftruncate(file.fileno(), size)
            return is_complete


def _truncate(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} ... ({len(text) - MAX_TEXT_CHARS} more characters)"
