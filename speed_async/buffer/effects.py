"""What a handler asks of the service. The service applies it; handlers do not know the service."""

from collections.abc import Sequence
from dataclasses import dataclass

from speed_async.buffer.evaluations import Accuracy
from speed_async.buffer.membership import ActorState
from speed_async.observability.metrics import EventKind, Value
from speed_async.transport.messages import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """An actor to declare lost."""

    state: ActorState
    reason: str
    warning: str = ""
    """Text for the user; empty for one that contains the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """Consequences of one message, applied in the order of the fields."""

    messages: Sequence[tuple[str, Message]] = ()
    """Messages with their peers."""
    to_learner: Sequence[Message] = ()
    """Messages to the learner, if it is connected."""
    lost: Sequence[Loss] = ()
    failure: str = ""
    """Why the run ends; empty if it continues."""
    evaluation: Accuracy | None = None
    """The evaluation that is now complete."""
    events: Sequence[tuple[EventKind, dict[str, Value]]] = ()
    """Events with their values in addition to those of the status."""
    ended: bool = False
    """The run has ended."""


def restart_warning(state: ActorState, what: str) -> str:
    return f"actor-{state.index} {what}; its supervisor restarts it"
