"""The journal: everything that was said to the service, on disk before any answer leaves.

An append-only log in segments. A record is a header (magic, checksum, length, sequence) and a body
(msgpack of its facts, then the raw frames of its message). Reading stops at the first record that
is not whole, so whatever a crash or a bad disk did to the tail, a good prefix remains. Each segment
begins with the configuration and a snapshot of the state; older segments are kept as long as a
group that still counts lies in one of them.

Why not SQLite: measured on the project's machine, 1 MB groups go into a WAL database at 270 MB/s
and then once more into its main file; they leave it only by deletes, page by page. Here they are
written once, at the disk's speed, and leave with their segment. And a WAL that lost its tail does
not say so.
"""

import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgpack
import xxhash

from speed_async.buffer.durability.direct_file import BLOCK_BYTES, DirectFile, is_padding
from speed_async.config.whole_file import flush
from speed_async.errors import JournalError
from speed_async.transport.codec import Frame

SEGMENT_BYTES = 512 * 1024 * 1024
"""A segment past this is closed at the next chance to take a snapshot."""
MAX_RECORD_BYTES = 1 << 40

RecordKind = Literal["opened", "snapshot", "message", "tick", "gone", "refused", "life"]
Place = tuple[int, int]
"""Segment and offset of a record."""

_HEAD = struct.Struct("<4sQQQ")
"""Magic, checksum (XXH3, 64 bits) of all that follows it, length of the body, sequence."""
_SUMMED = struct.Struct("<QQ")
_MAGIC = b"saj2"
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
    """Offset of the byte after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unwritten:
    sequence: int
    length: int
    body: list[Frame]

    def parts(self) -> list[Frame]:
        checksum = _checksum(self.length, self.sequence, self.body)
        return [_HEAD.pack(_MAGIC, checksum, self.length, self.sequence), *self.body]


class Journal:
    """The open end of the log. `write` and `sync` may run in another thread while records are
    appended in this one."""

    def __init__(self, folder: Path, segment: int, sequence: int) -> None:
        self.folder = folder
        self.sequence = sequence
        """Of the last record appended."""
        self.segment = segment
        self._unwritten: list[_Unwritten] = []
        self._writing = threading.Lock()
        self._is_named = False
        self.num_bytes = 0
        """Of this segment, what is not yet written included."""
        self._file = DirectFile(_path(folder, segment))

    @classmethod
    def begin(cls, folder: Path, segment: int, sequence: int) -> Self:
        """A new, empty segment after those in the folder. Raises OSError."""
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
        facts = msgpack.packb([kind, now_s, peer, text, value, [len(frame) for frame in frames]])
        assert facts is not None
        length = 4 + len(facts) + sum(map(len, frames))
        body = [struct.pack("<I", len(facts)), facts, *frames]
        self._unwritten.append(_Unwritten(sequence=self.sequence, length=length, body=body))
        self.num_bytes += _HEAD.size + length
        return place

    @property
    def pending_bytes(self) -> int:
        """Appended and not yet written."""
        return self.num_bytes - self._file.end

    def write(self) -> None:
        """Hand all that was appended to the system: a killed process loses none of it.

        Raises OSError (a full disk); everything is kept, and the next call tries again.
        """
        with self._writing:
            records = self._unwritten[:]
            self._file.append([part for record in records for part in record.parts()])
            del self._unwritten[: len(records)]

    def sync(self) -> None:
        """Wait until the disk has what was written, and the file's name. Raises OSError."""
        self._file.sync()
        if not self._is_named:
            flush(self.folder)
            self._is_named = True

    def read(self, place: Place) -> Record:
        """A record of this or an older segment. Raises JournalError when it is damaged or gone."""
        segment, offset = place
        if segment == self.segment and offset >= self._file.end:
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
        """Remove older segments in which nothing lies that is needed."""
        for segment in segments(self.folder):
            if segment < self.segment and segment not in needed:
                _path(self.folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Take back a segment that could not be begun."""
        _path(self.folder, self.segment).unlink(missing_ok=True)


def segments(folder: Path) -> list[int]:
    """Numbers of the segments there are, oldest first."""
    return sorted(int(path.stem) for path in folder.glob("*.journal") if path.stem.isdigit())


def read_segment(folder: Path, segment: int) -> Iterator[tuple[Place, Record]]:
    """Whole records from the first on; ends before the first that is not whole."""
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
    """The format that a segment is in, and the one that is written today; a beginning that is in
    none counts as the latter (it is damaged, then). Raises OSError."""
    with _path(folder, segment).open("rb") as file:
        magic = file.read(len(_MAGIC))
    found = magic if _ANY_MAGIC.fullmatch(magic) else _MAGIC
    return found.decode(), _MAGIC.decode()


def cut(folder: Path, segment: int, end: int) -> int:
    """Cut a segment after its last whole record; returns how many bytes were damaged."""
    path = _path(folder, segment)
    with path.open("rb") as file:
        file.seek(end)
        padded = is_padding(file.read(BLOCK_BYTES))
    damaged = path.stat().st_size - end
    if damaged > 0:
        os.truncate(path, end)
    return 0 if padded else damaged


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
