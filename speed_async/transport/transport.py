"""The transport interface: a client's Link and the service's Hub.

Guarantees of both implementations (checked by one contract test suite):

- Messages between one link and the hub arrive complete, in order, and at most once per send.
- Malformed input is answered with `Rejected` and counted. It never raises from the hub. The peer
  is muted: its further frames are dropped without decoding.
- Every wait has a deadline, whatever arrives meanwhile.
"""

from enum import Enum, auto
from typing import Protocol

from speed_async.transport.messages import Message
from speed_async.transport.muting import BlockedPeers

PeerName = str
"""Unique name of a link, such as `actor-1.0` (role, rank, incarnation)."""


class Delivery(Enum):
    QUEUED = auto()
    FULL = auto()
    """The queue of the peer is full."""
    GONE = auto()
    """The peer is not connected."""


class Link(Protocol):
    """One peer's connection to the service."""

    async def send(self, message: Message) -> None:
        """Queue a message; waits while the outbox is full, up to the deadline of the link."""
        ...

    async def receive(self, deadline_s: float) -> Message:
        """Wait for the next message. Raises DeadlineExceeded, TransportClosed or ProtocolError."""
        ...

    async def close(self) -> None:
        """Flush queued messages briefly and release all resources. May be called twice."""
        ...


class Hub(Protocol):
    """The service's side: many peers, identified by name."""

    rejected: int
    """Number of malformed messages so far."""
    muted: BlockedPeers
    newly_rejected: list[PeerName]
    """Peers that sent malformed messages; the service reads and clears the list."""

    def key_of(self, peer: PeerName) -> str:
        """The public key of the peer's connection; "" without CURVE."""
        ...

    def offer(self, peer: PeerName, message: Message) -> Delivery:
        """Queue a message to a peer without waiting."""
        ...

    async def receive(self, deadline_s: float) -> tuple[PeerName, Message]:
        """Wait for the next valid message of any peer.

        Raises DeadlineExceeded or TransportClosed.
        """
        ...

    def receive_now(self) -> tuple[PeerName, Message] | None:
        """The next valid message of any peer if one is available, else None."""
        ...

    def mute(self, peer: PeerName) -> None:
        """Drop further messages of this peer. Messages to it are still sent."""
        ...

    async def close(self) -> None: ...
