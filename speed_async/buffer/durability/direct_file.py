"""An append-only file that bypasses the page cache: written data goes directly to the disk.

A journal is written once and rarely read. The page cache would keep a copy of all of it, and
allocating pages for gigabytes can take more processor time than the rest of the service (measured
in a virtual machine that returns memory to its host: 18 ms for a group of 9 MB, against 0.4 ms with
direct writes). Direct writes consist of whole blocks from aligned memory. The last block is
therefore padded with zeros, and rewritten as it fills. The page cache is used where the file system
does not support direct writes, and for small writes: a direct write waits for the disk (50 us,
against 4 us in the cache).
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
"""Smaller writes go through the page cache."""


class DirectFile:
    """A new file, open for appending. Not thread-safe, but `sync` may run in another thread. Copies
    and writes release the GIL."""

    def __init__(self, path: Path) -> None:
        self.end = 0
        """Number of bytes appended."""
        self._tail = b""  # of the last, incomplete block
        self._memory = mmap.mmap(-1, BUFFER_BYTES)
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        self._can_bypass = self._bypass_cache(True)

    def append(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write all parts, or raise OSError and leave the file as it was."""
        direct = self._can_bypass and sum(map(len, parts)) >= DIRECT_BYTES
        try:
            (self._append_blocks if direct else self._append_bytes)(parts)
        except OSError:
            os.ftruncate(self._descriptor, self.end)
            raise

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Remove the padding and close the file."""
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
        buffer, fill, offset = self._buffer, len(self._tail), self.end - len(self._tail)
        buffer[:fill] = np.frombuffer(self._tail, np.uint8)
        for part in parts:
            source, copied = np.frombuffer(part, np.uint8), 0
            while copied < len(source):
                count = min(len(source) - copied, BUFFER_BYTES - fill)
                buffer[fill : fill + count] = source[copied : copied + count]
                copied, fill = copied + count, fill + count
                if fill == BUFFER_BYTES:
                    self._write(BUFFER_BYTES, offset)
                    offset, fill = offset + BUFFER_BYTES, 0
        whole = fill - fill % BLOCK_BYTES
        tail = buffer[whole:fill].tobytes()
        padded = -(-fill // BLOCK_BYTES) * BLOCK_BYTES
        buffer[fill:padded] = 0
        self._write(padded, offset)
        self.end, self._tail = offset + fill, tail

    def _bypass_cache(self, bypass: bool) -> bool:
        """Switch direct writes on or off. Returns False where they are not supported."""
        flag = getattr(os, "O_DIRECT", 0) if bypass else 0
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, self._flags | flag)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return bool(flag)

    def _write(self, count: int, offset: int) -> None:
        written = 0
        while written < count:  # a full disk accepts a part and refuses the rest
            written += os.pwrite(
                self._descriptor, self._buffer[written:count].data, offset + written
            )
            if written % BLOCK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_padding(rest: bytes) -> bool:
    """Whether the bytes after the last record are padding left by a killed process."""
    return len(rest) < BLOCK_BYTES and not any(rest)
