"""A group for the learner that is still in the journal or in the buffer's memory."""

from dataclasses import dataclass

from speed_async.buffer.priority import BufferedGroup
from speed_async.transport.messages import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredGroup(Message):
    """Placeholder of a GroupFinished until it is sent. Never sent itself."""

    lease_id: int
    segment: int
    offset: int

    @property
    def place(self) -> tuple[int, int]:
        return (self.segment, self.offset)


def batch_message(group: BufferedGroup) -> Message:
    """The message for the learner. Arrays stay in place until its queue has capacity."""
    if group.place is None:
        assert group.message is not None, "a group that is neither in memory nor in a journal"
        return group.message
    segment, offset = group.place
    return StoredGroup(lease_id=group.lease_id, segment=segment, offset=offset)
