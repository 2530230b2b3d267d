"""What a handler asks of the service, and what an input of the service results in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from speed_async.buffer.evaluations import Accuracy, EvaluationPlan, Evaluations
from speed_async.buffer.membership import ActorState
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.transport.messages import EvaluationBegan, EvaluationEnded, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """An actor to declare lost."""

    state: ActorState
    reason: str
    warning: str = ""
    """Text for the user; empty for one that contains the reason."""
    transient: bool = False
    """The warning needs no action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """Consequences of one message. The service applies them in the order of the fields; handlers do
    not know the service."""

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
    snapshot_due: bool = False
    """A checkpoint is durable, so a snapshot makes older records unnecessary."""


@dataclass(kw_only=True, slots=True)
class Results:
    """Everything that one input of the service results in, apart from its new state."""

    messages: list[tuple[str, Message]] = field(default_factory=list)
    """Messages with their peers."""
    events: list[Event] = field(default_factory=list)
    lost_peers: list[str] = field(default_factory=list)
    """Peers that are lost now; their sessions end."""
    expired_joins: list[str] = field(default_factory=list)
    """Supervisors whose joins expired; their sessions are removed."""
    snapshot_due: bool = False
    """A snapshot makes older records unnecessary."""


def began_messages(plans: Sequence[EvaluationPlan]) -> list[Message]:
    """To the learner: these evaluations are running. Version 0 has no checkpoint to keep."""
    return [
        EvaluationBegan(suite=plan.suite, policy_version=plan.target_version)
        for plan in plans
        if plan.target_version
    ]


def ended_messages(results: Sequence[Accuracy]) -> list[Message]:
    """To the learner: these evaluations are complete."""
    return [
        EvaluationEnded(
            suite=each.suite, policy_version=each.policy_version, accuracy=each.accuracy
        )
        for each in results
        if each.policy_version
    ]


def evaluation_messages(evaluations: Evaluations) -> list[Message]:
    """To a learner that connects: the last results, which it may have missed, and what is
    running."""
    known = [plan.results for plan in evaluations.plans]
    ended = ended_messages([results.last for results in known if results is not None])
    return [*ended, *began_messages(evaluations.plans)]


def restart_warning(state: ActorState, what: str) -> str:
    return f"actor-{state.index} {what}; its supervisor restarts it"
