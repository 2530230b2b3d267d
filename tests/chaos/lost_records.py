"""Which results lay in the part of a journal that a drill cuts off: only those may be missing."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from speed_async.wire import messages as m
from speed_async.wire.codec import decode
from speed_async.wire.tap import digest_of

ENDS: dict[type[m.Message], str] = {
    m.GroupFinished: "group",
    m.ScreenedOut: "screened_out",
    m.Evaluated: "evaluated",
    m.LeaseFailed: "failed",
}


@dataclass(kw_only=True)
class LostRecords:
    num_cuts: int = 0
    groups: set[str] = field(default_factory=set)
    """Digests (wire/tap.py)."""
    results: Counter[str] = field(default_factory=Counter)
    """By end, as the tap names them."""

    def add(self, segment: Path, end: int) -> None:
        """All records of this segment that are not whole in its first `end` bytes."""
        from speed_async.buffer.journal import read_segment, record_end

        self.num_cuts += 1
        for place, record in read_segment(segment.parent, int(segment.stem)):
            if record.kind != "message" or record_end(place, record) <= end:
                continue
            message = decode(record.frames)
            if (kind := ENDS.get(type(message))) is not None:
                self.results[kind] += 1
            if isinstance(message, m.GroupFinished):
                self.groups.add(digest_of(message))
