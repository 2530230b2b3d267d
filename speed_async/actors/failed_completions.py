"""Completions that their verifier could not score, kept for people to look at.

One line of JSON a call: which prompt, its text, the completions of the call, and what went wrong.
Keeping them is a service to people and no part of the run: a disk that is full or gone costs
records, which are counted, and nothing else.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from speed_async.types import Prompt

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Of one actor; the first failures are kept, and those that find no room are only counted."""
MAX_TEXT_CHARS = 100_000
"""Of one text; the rest is cut, and marked so."""


class FailedCompletions:
    """Appends to `path`, which other incarnations of the same actor wrote to before."""

    def __init__(self, path: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.num_kept = 0
        self.num_dropped = 0
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._writing = threading.Lock()

    def keep(self, prompt: Prompt, completions: Sequence[str], error: str) -> None:
        """Write one record, whole or not at all. Blocks on the disk; may be called in a thread."""
        record = {
            "prompt_id": prompt.prompt_id,
            "held_out": prompt.held_out,
            "prompt": _cut(prompt.text),
            "completions": [_cut(text) for text in completions],
            "error": error,
        }
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        with self._writing:
            try:
                kept = self._append(line)
            except OSError:
                kept = False
            self.num_kept += kept
            self.num_dropped += not kept

    def _append(self, line: bytes) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if size + len(line) > self._max_file_bytes:
                return False
            try:
                whole = file.write(line) == len(line)
            except OSError:
                whole = False
            if not whole:  # the disk filled up on the way
                os.ftruncate(file.fileno(), size)
            return whole


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} ... ({len(text) - MAX_TEXT_CHARS} more characters)"
