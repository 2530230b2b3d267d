"""Peers whose messages are ignored."""

from collections import OrderedDict

CAPACITY = 4096


class BlockedPeers:
    """Bounded set of peers whose frames are dropped without decoding.

    When it is full, the peer that was muted first is removed. That peer is muted again after its
    next malformed message.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.num_blocked = 0
        """Total number of peers muted so far."""
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
        self.num_blocked += 1
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)
