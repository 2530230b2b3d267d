"""Metadata of the buffered groups as packed rows, in a third of the memory of objects.

A group that is spilled to disk keeps only its row in memory, so a million rows must be cheap. A
record object takes 400 bytes because each of its numbers is an object. A row takes 72 bytes, and
the garbage collector does not traverse it.
"""

import struct
from array import array
from dataclasses import dataclass
from typing import ClassVar

from speed_async.transport.messages import GroupFinished

_ROW = struct.Struct("<qqqqqqqdd")
_NUM_TAKES = struct.Struct("<q")
_NO_PLACE = (-1, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedGroup:
    """A finished group and its metadata."""

    UNSAVED: ClassVar = ("message",)

    message: GroupFinished | None
    """None while the group is on disk, at `place`."""
    lease_id: int
    pass_rate: float
    oldest_version: int
    mean_version: float
    num_tokens: int
    num_bytes: int
    place: tuple[int, int] | None = None
    """Journal segment and offset in it, both from 0; None without a journal."""


class GroupTable:
    """Groups by slot. The slot of a removed group is reused."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._messages: list[GroupFinished | None] = []
        self._free = array("q")

    def add(self, group: BufferedGroup, num_takes: int) -> int:
        """Add a group that arrives after `num_takes` takes; returns its slot."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._messages)
            self._messages.append(None)
            self._rows += bytes(_ROW.size)
        self._messages[slot] = group.message
        _ROW.pack_into(
            self._rows,
            slot * _ROW.size,
            num_takes,
            group.lease_id,
            group.oldest_version,
            group.num_tokens,
            group.num_bytes,
            *(group.place or _NO_PLACE),
            group.pass_rate,
            group.mean_version,
        )
        return slot

    def num_takes_before(self, slot: int) -> int:
        return _NUM_TAKES.unpack_from(self._rows, slot * _ROW.size)[0]

    def read(self, slot: int) -> BufferedGroup:
        row = _ROW.unpack_from(self._rows, slot * _ROW.size)
        _, lease_id, oldest_version, num_tokens, num_bytes, segment, offset, *means = row
        return BufferedGroup(
            message=self._messages[slot],
            lease_id=lease_id,
            pass_rate=means[0],
            oldest_version=oldest_version,
            mean_version=means[1],
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            place=None if segment < 0 else (segment, offset),
        )

    def pop(self, slot: int) -> BufferedGroup:
        """Remove and return the group; its slot becomes free."""
        group = self.read(slot)
        self._messages[slot] = None
        self._free.append(slot)
        return group
