"""Messages of the supervisors of actors: how they find their place in a run, and leave it."""

from dataclasses import dataclass

from speed_async.transport.messages import Counted, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Join(Message):
    """Supervisor -> service: an actor wants to take part in this run."""

    machine: str
    process_id: int
    has_rank: bool = False
    """A launcher started it as a rank of this run; otherwise it came by itself."""
    rank: int = 0
    """With `has_rank`: which one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinAccepted(Message):
    """Service -> supervisor: what its actor is to be. A run that ends answers with Rejected."""

    index: int
    """Its rank; of one that came by itself beyond all ranks, and never given twice."""
    config: str
    """The resolved configuration as JSON text."""
    feed_port: int
    """The metrics feed, on the service's host: it tells when the run has ended."""
    incarnation: int = 0
    """Of its next actor: greater than any that the service knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving(Counted):
    """Actor -> service: it was told to stop. Offers made before the answering Drain are kept."""
