"""The journal (write-ahead log): every message to the service is on disk before a reply is sent.

An append-only log in segments. A record is a header (magic, checksum, length, sequence) and a body
(msgpack of its fields, then the raw frames of its message). Reading stops at the first incomplete
record, so a valid prefix remains after a crash or a disk error. Each segment begins with the
configuration and a snapshot of the state. Older segments are kept as long as they contain a group
that is still needed.

Why not SQLite: measured on the project's machine, 1 MB groups enter a WAL database at 270 MB/s and
are then copied into its main file. They are removed only by deletes, page by page. Here they are
written once, at disk speed, and removed with their segment. A WAL with a lost tail also does not
report the loss.
"""

import os
import re
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import msgpack
import xxhash

from speed_async.config.whole_file import flush
from speed_async.errors import JournalError
from speed_async.transport.codec import Frame

SEGMENT_BYTES = 512 * 1024 * 1024
"""A larger segment is closed at the next opportunity for a snapshot."""
MAX_RECORD_BYTES = 1 << 40
MAX_PARTS = 512
"""Parts of one write; Linux accepts 1,024."""

RecordKind = Literal["opened", "snapshot", "message", "tick", "gone", "refused", "attempt"]
Place = tuple[int, int]
"""Segment and offset of a record."""

_HEAD = struct.Struct("<4sQQQ")
"""Magic, checksum (XXH3, 64 bits) of all that follows it, length of the body, sequence."""
_SUMMED = struct.Struct("<QQ")
_MAGIC = b"saj4"
_ANY_MAGIC = re.compile(rb"saj\d")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    kind: RecordKind
    sequence: int
    now_s: float
    peer: str = ""
    text: str = ""
    value: float = 0.0
    frames: Sequence[Frame] = ()
    end: int = 0
    """Offset of the byte after the record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unwritten:
    sequence: int
    length: int
    body: list[Frame]
    """The fields with their length, and the frames."""

    def parts(self) -> list[Frame]:
        checksum = _checksum(self.length, self.sequence, self.body)
        head = _HEAD.pack(_MAGIC, checksum, self.length, self.sequence)
        return [head + self.body[0], *self.body[1:]]


class Journal:
    """The writable end of the log. `write` and `sync` may run in another thread while this thread
    appends records."""

    def __init__(self, folder: Path, segment: int, sequence: int) -> None:
        self.folder = folder
        self.sequence = sequence
        """Sequence number of the last appended record."""
        self.segment = segment
        self._unwritten: list[_Unwritten] = []
        self._writing = threading.Lock()
        self._is_named = False
        self.num_bytes = 0
        """Size of this segment, including unwritten records."""
        self._num_written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._descriptor = os.open(_path(folder, segment), flags, 0o600)

    @classmethod
    def begin(cls, folder: Path, segment: int, sequence: int) -> Self:
        """Create a new, empty segment after those in the folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        _path(folder, segment).unlink(missing_ok=True)
        return cls(folder, segment, sequence)

    def append(
        self,
        kind: RecordKind,
        now_s: float,
        *,
        peer: str = "",
        text: str = "",
        value: float = 0.0,
        frames: Sequence[Frame] = (),
    ) -> Place:
        """Add a record; `write` brings it to disk. The frames must not change before that."""
        self.sequence += 1
        place = (self.segment, self.num_bytes)
        fields = msgpack.packb([kind, now_s, peer, text, value, [len(frame) for frame in frames]])
        length = 4 + len(fields) + sum(map(len, frames))
        first, *rest = frames or [b""]
        # Small parts are copied together: each costs a checksum and a write of its own.
        body = [struct.pack("<I", len(fields)) + fields + bytes(first), *rest]
        self._unwritten.append(_Unwritten(sequence=self.sequence, length=length, body=body))
        self.num_bytes += _HEAD.size + length
        return place

    @property
    def pending_bytes(self) -> int:
        """Number of bytes appended and not yet written."""
        return self.num_bytes - self._num_written

    def write(self) -> None:
        """Pass all appended records to the operating system, so that they survive a killed process.

        Raises OSError (a full disk). Nothing is lost then; the next call retries.
        """
        with self._writing:
            records = self._unwritten[:]
            self._append([part for record in records for part in record.parts()])
            del self._unwritten[: len(records)]

    def _append(self, parts: Sequence[Frame]) -> None:
        """Write all parts, or raise OSError and leave the file as it was."""
        end = self._num_written
        left = deque(parts)
        try:
            while left:
                count = os.pwritev(self._descriptor, list(islice(left, MAX_PARTS)), end)
                end += count
                while left and count >= len(left[0]):
                    count -= len(left.popleft())
                if count:
                    left[0] = memoryview(left[0])[count:]
        except OSError:
            os.ftruncate(self._descriptor, self._num_written)
            raise
        self._num_written = end

    def sync(self) -> None:
        """Wait until the written data and the file's name are on disk. Raises OSError."""
        os.fdatasync(self._descriptor)
        # The journal is rarely read; a copy of all of it would fill the page cache.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if not self._is_named:
            flush(self.folder)
            self._is_named = True

    def read(self, place: Place) -> Record:
        """Read a record of any segment. Raises JournalError if it is damaged or missing."""
        segment, offset = place
        if segment == self.segment and offset >= self._num_written:
            self.write()
        try:
            with _path(self.folder, segment).open("rb") as file:
                file.seek(offset)
                record = _read_record(file.read, offset)
        except OSError as error:
            raise JournalError(f"journal segment {segment} cannot be read: {error}") from error
        if record is None:
            raise JournalError(f"journal segment {segment} is damaged at byte {offset}")
        return record

    def drop(self, needed: set[int]) -> None:
        """Remove older segments that contain nothing in `needed`."""
        for segment in segments(self.folder):
            if segment < self.segment and segment not in needed:
                _path(self.folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove a segment whose creation failed."""
        _path(self.folder, self.segment).unlink(missing_ok=True)


def segments(folder: Path) -> list[int]:
    """Numbers of the existing segments, oldest first."""
    return sorted(int(path.stem) for path in folder.glob("*.journal") if path.stem.isdigit())


def read_segment(folder: Path, segment: int) -> Iterator[tuple[Place, Record]]:
    """Yield the complete records from the start, up to the first incomplete one."""
    sequence: int | None = None
    with _path(folder, segment).open("rb") as file:
        while True:
            place = (segment, file.tell())
            record = _read_record(file.read, place[1])
            if record is None or (sequence is not None and record.sequence != sequence + 1):
                return
            sequence = record.sequence
            yield place, record


def format_of(folder: Path, segment: int) -> tuple[str, str]:
    """The format of a segment, and the current one. A segment without a known magic counts as the
    current format (it is damaged). Raises OSError."""
    with _path(folder, segment).open("rb") as file:
        magic = file.read(len(_MAGIC))
    found = magic if _ANY_MAGIC.fullmatch(magic) else _MAGIC
    return found.decode(), _MAGIC.decode()


def cut(folder: Path, segment: int, end: int) -> int:
    """Truncate a segment after its last complete record. Returns the number of damaged bytes."""
    path = _path(folder, segment)
    damaged = path.stat().st_size - end
    if damaged > 0:
        os.truncate(path, end)
    return damaged


def _checksum(length: int, sequence: int, body: Sequence[Frame]) -> int:
    checksum = xxhash.xxh3_64(_SUMMED.pack(length, sequence))
    for part in body:
        checksum.update(part)
    return checksum.intdigest()


def _read_record(read: Callable[[int], bytes], offset: int) -> Record | None:
    head = read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, checksum, length, sequence = _HEAD.unpack(head)
    if magic != _MAGIC or not 4 < length < MAX_RECORD_BYTES:
        return None
    try:
        body = read(length)
    except (OSError, OverflowError, MemoryError):
        return None
    if len(body) < length:
        return None
    if _checksum(length, sequence, [body]) != checksum:
        return None
    (size,) = struct.unpack_from("<I", body)
    kind, now_s, peer, text, value, lengths = msgpack.unpackb(body[4 : 4 + size])
    frames, at, view = [], 4 + size, memoryview(body)
    for frame_bytes in lengths:
        frames.append(view[at : at + frame_bytes])
        at += frame_bytes
    return Record(
        kind=kind,
        sequence=sequence,
        now_s=now_s,
        peer=peer,
        text=text,
        value=value,
        frames=tuple(frames),
        end=offset + _HEAD.size + length,
    )


def _path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:08d}.journal"
