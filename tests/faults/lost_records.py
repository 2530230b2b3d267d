"""Results in the part of a journal that a drill cuts off: only those may be missing."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from speed_async.buffer.durability.journal import read_segment
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.tracing import group_digest

ENDS: dict[type[m.Message], str] = {
    m.GroupFinished: "group",
    m.ScreenedOut: "screened_out",
    m.Evaluated: "evaluated",
    m.LeaseFailed: "failed",
}


@dataclass(kw_only=True)
class LostRecords:
    times_s: list[float] = field(default_factory=list)
    """Wall-clock times of the cuts."""
    groups: set[str] = field(default_factory=set)
    """Digests (transport/tracing.py)."""
    results: Counter[str] = field(default_factory=Counter)
    """Counts by end, with the names used in the traces."""

    def add(self, segment: Path, end: int) -> None:
        """Add all records of this segment that do not fit in its first `end` bytes."""
        self.times_s.append(time.time())
        for _, record in read_segment(segment.parent, int(segment.stem)):
            if record.kind != "message" or record.end <= end:
                continue
            message = decode(record.frames)
            if (kind := ENDS.get(type(message))) is not None:
                self.results[kind] += 1
            if isinstance(message, m.GroupFinished):
                self.groups.add(group_digest(message))
