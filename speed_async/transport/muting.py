"""Peers that are not listened to any more."""

from collections import OrderedDict

CAPACITY = 4096


class BlockedPeers:
    """Names whose frames are dropped unread. It is bounded: past its capacity, whoever was muted
    longest ago is heard again, until it errs again."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.num_muted = 0
        """Peers muted so far."""
        self._capacity = capacity
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: bytes) -> None:
        if name in self._names:
            return
        self._names[name] = None
        self.num_muted += 1
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)
