"""What is known of each waiting group, as packed rows: a third of what objects would take.

A group that waits on disk is nothing but its row, so a million of them must be cheap. As an object
each number of a record is an object of its own, and the record takes 400 bytes; a row takes 72, and
the garbage collector never walks it.
"""

import struct
from array import array
from dataclasses import dataclass
from typing import ClassVar

from speed_async.transport.messages import GroupFinished

_ROW = struct.Struct("<qqqqqqqdd")
_NUM_TAKES = struct.Struct("<q")
_NOWHERE = (-1, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedGroup:
    """A finished group and what the buffer needs to know of it."""

    UNSAVED: ClassVar = ("message",)

    message: GroupFinished | None
    """None while it waits on disk, at `place`."""
    lease_id: int
    pass_rate: float
    oldest_version: int
    mean_version: float
    num_tokens: int
    num_bytes: int
    place: tuple[int, int] | None = None
    """Segment of the journal and offset in it, both from 0; None where no journal is kept."""


class GroupTable:
    """Groups by slot. A slot is used again once its group has left."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._messages: list[GroupFinished | None] = []
        self._free = array("q")

    def add(self, group: BufferedGroup, num_takes: int) -> int:
        """The slot of a group that came when there had been `num_takes` takes."""
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
            *(group.place or _NOWHERE),
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
        """The group, whose slot is free from now on."""
        group = self.read(slot)
        self._messages[slot] = None
        self._free.append(slot)
        return group
