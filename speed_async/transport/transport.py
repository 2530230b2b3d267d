"""The transport seam: a client's Link and the service's Hub.

Guarantees both implementations give (and one contract suite checks): messages between one link
and the hub arrive whole, in order, at most once per send; malformed input from a peer is answered
with `Rejected`, counted, and never raises out of the hub; that peer is muted, its further frames
dropped unread; every wait has a deadline, whatever comes meanwhile.
"""

from enum import Enum, auto
from typing import Protocol

from speed_async.transport.messages import Message
from speed_async.transport.muting import BlockedPeers

PeerName = str
"""Unique name a link announces, such as `actor-1.0` (role, rank, incarnation)."""


class Delivery(Enum):
    QUEUED = auto()
    FULL = auto()
    """The peer's queue has no room now."""
    GONE = auto()
    """The peer has no connection now."""


class Link(Protocol):
    """One peer's connection to the service."""

    async def send(self, message: Message) -> None:
        """Queue a message; waits (within the link's deadline) while the outbox is full."""
        ...

    async def receive(self, deadline_s: float) -> Message:
        """Next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        ...

    async def close(self) -> None:
        """Flush what was sent (briefly) and release everything. May be called twice."""
        ...


class Hub(Protocol):
    """The service's side: many peers, told apart by name."""

    rejected: int
    """Malformed messages so far."""
    muted: BlockedPeers
    newly_rejected: list[PeerName]
    """Peers of whom malformed messages came, for the service to take note of and clear."""

    def key_of(self, peer: PeerName) -> str:
        """The public key of the peer's connection; "" where connections have none."""
        ...

    def offer(self, peer: PeerName, message: Message) -> Delivery:
        """Queue a message to a peer, if that can be done at once."""
        ...

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """Next valid message of any peer. Raises DeadlineExceeded or TransportClosed."""
        ...

    def receive_now(self) -> tuple[PeerName, Message] | None:
        """The same, if there is one already."""
        ...

    def mute(self, peer: PeerName) -> None:
        """Listen to this peer no more; what is said to it still goes out."""
        ...

    async def close(self) -> None: ...
