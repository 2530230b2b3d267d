"""Messages of actors that come and go by themselves, outside torchrun's ranks."""

from dataclasses import dataclass

from speed_async.wire.messages import Counted, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Join(Message):
    """Supervisor -> service: an actor wants to take part in this run."""

    machine: str
    process_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinAccepted(Message):
    """Service -> supervisor: what its actor is to be. A run that ends answers with Rejected."""

    index: int
    """Beyond all torchrun ranks, and never given twice."""
    config: str
    """The resolved configuration as JSON text."""
    feed_port: int
    """The metrics feed, on the service's host: it tells when the run has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving(Counted):
    """Actor -> service: it was told to stop. Offers made before the answering Drain are kept."""
