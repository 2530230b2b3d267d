"""Messages of actor supervisors: joining and leaving a run."""

from dataclasses import dataclass

from speed_async.transport.messages import Counted, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Join(Message):
    """Supervisor -> service: request to add an actor to this run."""

    machine: str
    process_id: int
    has_rank: bool = False
    """Whether a launcher started it as a rank of this run; otherwise it joins on its own."""
    rank: int = 0
    """The rank; used only if `has_rank`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinAccepted(Message):
    """Service -> supervisor: identity of its actor. A run that is ending replies Rejected."""

    index: int
    """Rank of the actor. An actor without a rank gets a unique index above all ranks."""
    config: str
    """The resolved configuration as JSON text."""
    feed_port: int
    """Port of the metrics feed on the service's host; the feed reports the end of the run."""
    incarnation: int = 0
    """Incarnation of its next actor: greater than any known to the service."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving(Counted):
    """Actor -> service: the actor was asked to stop.

    Weight offers sent before the Drain reply remain valid.
    """
