"""Messages between the learner ranks: the lead (rank 0) and its followers.

Every command names a collective operation, which all ranks execute in the order of the commands.
"""

from dataclasses import dataclass

from speed_async.transport.messages import Message, Prose

# --- follower -> lead ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Follow(Message):
    """First message of a follower."""

    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive(Message):
    """Either side, regularly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWritten(Message):
    folder: str
    error: Prose
    """Why the files could not be written; empty when they were."""


# --- lead -> follower ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LeadPlan(Message):
    """Reply to Follow."""

    config: str
    """The resolved configuration as JSON text."""
    store_host: str
    store_port: int
    """The store at which the process group of the learners meets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroups(Message):
    """Train on the `num_groups` groups (GroupFinished) that follow."""

    num_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureCanary(Message):
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherWeights(Message):
    names: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureShard(Message):
    """Capture this rank's part of the training state, for WriteShard."""

    copy: bool
    """Whether updates follow before it is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteShard(Message):
    """Write what was captured, in the background. The reply is ShardWritten."""

    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreCheckpoint(Message):
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StopFollowing(Message):
    error: Prose = ""
    """Why the run failed; empty when it ended in order."""
