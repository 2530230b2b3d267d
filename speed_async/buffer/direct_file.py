"""A file that grows past the page cache: what was written is on its way to the disk, not in memory.

A journal is written once and hardly ever read. The page cache would keep a copy of all of it, and
finding fresh pages for gigabytes may cost more processor time than all else that the service does
(measured in a virtual machine that gives memory back to its host: 18 ms for a group of 9 MB, and
0.4 ms past the cache). Such writes are of whole blocks from aligned memory, so the last block is
written padded with zeros, and written again as it fills. They wait for the device, so what is
small goes through the cache, and all of it where the file system cannot do otherwise.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

BLOCK_BYTES = 4096
BUFFER_BYTES = 4 * 1024 * 1024
CACHED_BYTES = 256 * 1024
"""Less than this is written to the page cache, which never waits for a device."""


class DirectFile:
    """A new file, open for appending. Not thread-safe, but `sync` may run in another thread."""

    def __init__(self, path: Path) -> None:
        self.end = 0
        """Bytes appended."""
        self._tail = b""  # of the last block, which is not full
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o600)
        self._cached = os.open(path, os.O_RDWR)

    def append(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write all of it or raise OSError; then the file is as it was."""
        if sum(map(len, parts)) < CACHED_BYTES:
            self._append_cached(b"".join(parts))
        else:
            self._append_direct(parts)

    def _append_cached(self, data: bytes) -> None:
        try:
            if os.pwrite(self._cached, data, self.end) < len(data):  # a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._descriptor, self.end)
            raise
        self.end += len(data)
        num_tail = self.end % BLOCK_BYTES
        self._tail = (self._tail + data)[-num_tail:] if num_tail else b""

    def _append_direct(self, parts: Sequence[bytes | memoryview]) -> None:
        buffer, fill, at = self._buffer, len(self._tail), self.end - len(self._tail)
        buffer[:fill] = self._tail
        try:
            for part in parts:
                view, taken = memoryview(part).cast("B"), 0
                while taken < len(view):
                    count = min(len(view) - taken, BUFFER_BYTES - fill)
                    buffer[fill : fill + count] = view[taken : taken + count]
                    taken, fill = taken + count, fill + count
                    if fill == BUFFER_BYTES:
                        self._write(BUFFER_BYTES, at)
                        at, fill = at + BUFFER_BYTES, 0
            num_tail = fill % BLOCK_BYTES
            whole = fill - num_tail
            tail = bytes(buffer[whole:fill])
            padded = -(-fill // BLOCK_BYTES) * BLOCK_BYTES
            buffer[fill:padded] = bytes(padded - fill)
            self._write(padded, at)
        except OSError:
            os.ftruncate(self._descriptor, self.end)
            raise
        self.end, self._tail = at + fill, tail

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """The padding goes."""
        os.ftruncate(self._descriptor, self.end)
        os.close(self._descriptor)
        os.close(self._cached)
        self._buffer.close()

    def _write(self, count: int, at: int) -> None:
        with memoryview(self._buffer) as view:
            written = 0
            while written < count:  # a full disk takes a part, and refuses the rest
                with view[written:count] as rest:
                    written += os.pwrite(self._descriptor, rest, at + written)
                if written % BLOCK_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_padding(rest: bytes) -> bool:
    """Whether what stands behind a file's last record is what a killed process left of padding."""
    return len(rest) < BLOCK_BYTES and not any(rest)
