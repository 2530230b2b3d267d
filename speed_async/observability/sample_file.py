"""`samples.jsonl` of a run folder: human-readable completions in a file of bounded size."""

import errno
import json
import os
from pathlib import Path

from speed_async.observability.metrics import Value

SAMPLES_FILE = "samples.jsonl"
MAX_FILE_BYTES = 16 * 1024 * 1024
"""About four thousand long samples. Later samples are dropped; the last line records this."""
FULL = "full"
"""Kind of the last line of a full file."""


class SampleFile:
    """Appends one JSON object per line: `kind`, then the sample's values
    (observability/metrics.py).

    Lines are written atomically, so a resumed run appends to the file. The file is created with the
    first sample.
    """

    def __init__(self, run_folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.path = run_folder / SAMPLES_FILE
        self._max_file_bytes = max_file_bytes
        self._is_full = False

    def write(self, values: dict[str, Value]) -> None:
        """Append a sample. Raises OSError if it cannot be written; the file is unchanged then."""
        if self._is_full:
            return
        with self.path.open("a+b", buffering=0) as file:
            size = drop_partial_line(file.fileno())
            line = _line({"kind": "sample"} | values)
            if size + len(line) > self._max_file_bytes:
                self._is_full = True
                if last_line(file.fileno(), size).startswith(_line({"kind": FULL})[:-2]):
                    return
                line = _line({"kind": FULL, "max_bytes": self._max_file_bytes})
            try:
                is_complete = file.write(line) == len(line)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
            if not is_complete:
                os.ftruncate(file.fileno(), size)
                raise OSError(errno.ENOSPC, "no disk space for a sample")


def _line(values: dict[str, Value]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def drop_partial_line(file: int) -> int:
    """Truncate a partial last line of a killed process. Returns the new size."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        size -= len(last_line(file, size))
        os.ftruncate(file, size)
    return size


def last_line(file: int, size: int, block: int = 65536) -> bytes:
    """The last line, complete or partial."""
    start = max(0, size - block)
    while True:
        tail = os.pread(file, size - start, start)
        end = tail.rfind(b"\n", 0, max(len(tail) - 1, 0))
        if end >= 0 or start == 0:
            return tail[end + 1 :]
        start = max(0, start - block)
