"""A file that grows past the page cache: what was written is on its way to the disk, not in memory.

A journal is written once and hardly ever read. The page cache would keep a copy of all of it, and
finding fresh pages for gigabytes may cost more processor time than all else that the service does
(measured in a virtual machine that gives memory back to its host: 18 ms for a group of 9 MB, and
0.4 ms past the cache). Such writes are of whole blocks from aligned memory, so the last block is
written padded with zeros, and written again as it fills. Where the file system cannot do it, the
cache is used. So it is for small writes: past it each waits for the disk (50 us, in the cache 4).
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4096
BUFFER_BYTES = 4 * 1024 * 1024
DIRECT_BYTES = 64 * 1024
"""Less than this goes into the page cache."""


class DirectFile:
    """A new file, open for appending. Not thread-safe, but `sync` may run in another thread; copies
    and writes let other threads run."""

    def __init__(self, path: Path) -> None:
        self.end = 0
        """Bytes appended."""
        self._tail = b""  # of the last block, which is not full
        self._memory = mmap.mmap(-1, BUFFER_BYTES)
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        self._can_bypass = self._bypass_cache(True)

    def append(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write all of it or raise OSError; then the file is as it was."""
        direct = self._can_bypass and sum(map(len, parts)) >= DIRECT_BYTES
        try:
            (self._append_blocks if direct else self._append_bytes)(parts)
        except OSError:
            os.ftruncate(self._descriptor, self.end)
            raise

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """The padding goes."""
        os.ftruncate(self._descriptor, self.end)
        os.close(self._descriptor)
        del self._buffer
        self._memory.close()

    def _append_bytes(self, parts: Sequence[bytes | memoryview]) -> None:
        self._bypass_cache(False)
        joined = b"".join(parts)
        if os.pwrite(self._descriptor, joined, self.end) < len(joined):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.end += len(joined)
        num_tail = self.end % BLOCK_BYTES
        self._tail = (self._tail + joined)[-num_tail:] if num_tail else b""

    def _append_blocks(self, parts: Sequence[bytes | memoryview]) -> None:
        self._bypass_cache(True)
        buffer, fill, at = self._buffer, len(self._tail), self.end - len(self._tail)
        buffer[:fill] = np.frombuffer(self._tail, np.uint8)
        for part in parts:
            view, taken = np.frombuffer(part, np.uint8), 0
            while taken < len(view):
                count = min(len(view) - taken, BUFFER_BYTES - fill)
                buffer[fill : fill + count] = view[taken : taken + count]
                taken, fill = taken + count, fill + count
                if fill == BUFFER_BYTES:
                    self._write(BUFFER_BYTES, at)
                    at, fill = at + BUFFER_BYTES, 0
        whole = fill - fill % BLOCK_BYTES
        tail = buffer[whole:fill].tobytes()
        padded = -(-fill // BLOCK_BYTES) * BLOCK_BYTES
        buffer[fill:padded] = 0
        self._write(padded, at)
        self.end, self._tail = at + fill, tail

    def _bypass_cache(self, bypass: bool) -> bool:
        """Have the next write go past the cache, or through it. False where it cannot."""
        flag = getattr(os, "O_DIRECT", 0) if bypass else 0
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, self._flags | flag)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return bool(flag)

    def _write(self, count: int, at: int) -> None:
        written = 0
        while written < count:  # a full disk takes a part, and refuses the rest
            written += os.pwrite(self._descriptor, self._buffer[written:count].data, at + written)
            if written % BLOCK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_padding(rest: bytes) -> bool:
    """Whether what stands behind a file's last record is what a killed process left of padding."""
    return len(rest) < BLOCK_BYTES and not any(rest)
