"""Messages of the protocol, except those of joining.py and session.py.

Messages are flat and frozen. Fields are int, float, str, bool, lists of those, `dict[str, float]`,
`dict[str, object]` of plain values (metrics), or numpy arrays (sent as raw frames). The packed
arrays of a group hold its completions one after another; `lengths` holds their lengths.

All messages are in one file, as the table of the protocol, in the order of who sends them.

Shape legend: P prompt tokens, N completions, S sum of completion lengths.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Self

from speed_async.types import ActorCounts, Float32Array, Int32Array, WeightBackend, WeightOffer

PROTOCOL_VERSION = 12
Frame = bytes | memoryview
MAX_PROSE_CHARS = 4096
Prose = Annotated[str, "prose"]
"""Text for people, of any length and content. Encoding cuts out the middle of a longer one and
replaces what UTF-8 cannot encode: no error is lost because of its own text."""

DRAINED = "drained"
"""Reason of a LeaseFailed that does not concern the prompt."""
UNUSABLE = "prompt"
"""Kind of the reason (`kind: text`) of a LeaseFailed whose prompt the model cannot process."""
STALE = "stale"
"""Reason of a LeaseFailed whose tokens became too stale before the group was complete."""


class Framed:
    """Holds the frames that a message was decoded from, for the journal and for forwarding.

    They are no field, so a changed copy made by `replace` has none.
    """

    __slots__ = ("_frames",)

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Empty for a message that was not decoded."""
        return getattr(self, "_frames", ())

    def keep(self, frames: tuple[Frame, ...]) -> None:
        object.__setattr__(self, "_frames", frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message(Framed):
    """Base class of all messages. Both fields belong to the session (transport/session.py)."""

    number: int = 0
    """Sequence number in the session, from 1; 0 for a message that is not numbered."""
    received: int = 0
    """Acknowledgement: all messages of the other side up to this number were received."""

    def numbered(self, number: int, received: int) -> Self:
        """This message, with its frames, in another session."""
        message = replace(self, number=number, received=received)
        message.keep(self.frames)
        return message


# --- any peer -> service -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Message):
    """First message of a peer. The fingerprints identify its data and its model."""

    role: str  # "actor" | "learner"
    index: int  # torchrun rank
    incarnation: int  # increases with every restart of the same rank
    fingerprint: str
    process_id: int
    model_fingerprint: str = ""
    """Fingerprint of the settings, the tokenizer and samples of the weights of the model folder."""
    weight_ranks: int = 1
    """Consecutive weight group ranks of an actor's engine (tensor parallelism)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure(Message):
    """A role failed with an error that ends the run."""

    role: str
    message: Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorExited(Message):
    """From the supervisor of an actor: its process has died and is restarted."""

    role: str
    incarnation: int
    how: Prose


# --- actor -> service (with the counts of the actor) --------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted(Message):
    counts: ActorCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class WantWork(Counted):
    """Total number of leases that the actor can take now; replaces earlier requests."""

    num_prompts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFinished(Counted):
    """A complete group that passed the gate. In a batch, the service forwards it to the learner."""

    lease_id: int
    prompt_id: int
    num_screening: int
    prompt_token_ids: Int32Array  # (P,)
    lengths: Int32Array  # (N,)
    rewards: Float32Array  # (N,) of any sign
    passed: Int32Array  # (N,) 1 if the completion passed, else 0
    cut: Int32Array  # (N,) 1 if the completion was truncated by a length limit, else 0
    token_ids: Int32Array  # (S,)
    logprobs: Float32Array  # (S,)
    policy_versions: Int32Array  # (S,)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseEnded(Counted):
    """Base class: a lease ended without a group, so only counts are sent."""

    lease_id: int
    num_completions: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseFailed(LeaseEnded):
    """A lease of either kind ended without a result (verifier failure, drain, too long)."""

    reason: Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseScored(LeaseEnded):
    """Base class: the completions were scored."""

    num_passed: int
    num_truncated: int
    """Completions truncated by a length limit."""
    num_truncated_passed: int = 0
    """Those of them that passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenedOut(LeaseScored):
    """The gate rejected a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(LeaseScored):
    """A held-out prompt was sampled and scored."""

    num_unscored: int = 0
    """Completions without a verdict (timeout or error of the verifier); none of them passed."""
    oldest_version: int
    """Oldest policy version of the tokens; 0 if there are no tokens."""
    newest_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(Counted):
    """One completion for display (the `sample` event of observability/metrics.py).

    It does not affect the run. `extracted` is empty if `is_extracted` is False.
    """

    policy_version: int
    prompt_id: int
    held_out: bool
    decision: str
    reward: float
    passed: bool
    is_extracted: bool
    extracted: Prose
    truncated: bool
    num_tokens: int
    prompt: Prose
    completion: Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorReport(Counted):
    """Heartbeat with gauges (slots_busy, num_slots, waiting, loop_lag_s, policy_version, ...)."""

    gauges: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsApplied(Counted):
    """The actor now samples with this version. A negative version reports a failure in `error`."""

    policy_version: int
    epoch: int
    pause_s: float
    transfer_s: float
    error: Prose
    usable: bool = True
    """False if the engine no longer has complete weights; the actor then exits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodbye(Counted):
    """Last message of an actor, sent after draining."""


# --- service -> actor ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome(Message):
    """Reply to Hello. A peer that joins late waits for weights if `policy_version` > 0."""

    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Leases(Message):
    """Granted leases, as parallel lists. For training leases, `suite` is empty and `num_samples` is
    0."""

    lease_ids: list[int]
    prompt_ids: list[int]
    kind: str  # LeaseKind
    num_samples: int
    suite: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferWeights(Message):
    """Request to join a broadcast. The rank of the offer is the first rank of the actor."""

    offer: WeightOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Drain(Message):
    """Request to abort running work, report it, send Goodbye and exit."""

    reason: Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected(Message):
    """A message of the peer was rejected for this reason."""

    reason: Prose


# --- learner -> service -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeBatch(Message):
    """Request `num_groups` groups within the staleness bound of `policy_version`.

    The reply is sent when they are available.
    """

    policy_version: int
    num_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(Message):
    """One update finished: its groups and metrics. `skipped` if the step was non-finite."""

    policy_version: int  # version after the update
    lease_ids: list[int]
    skipped: bool
    groups_trained: int  # learner's own cumulative counts
    completions_trained: int
    tokens_trained: int
    metrics: dict[str, float]
    notice: Prose = ""
    """Human-readable notice, such as a checkpoint that could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishWeights(Message):
    """The learner has a version to broadcast and requests the participants."""

    policy_version: int
    store_host: str
    store_port: int
    backend: WeightBackend
    deadline_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsPublished(Message):
    """A broadcast ended. `error` is empty on success; `missing` names the actors that failed."""

    policy_version: int
    epoch: int
    transfer_s: float
    num_bytes: int
    error: Prose
    missing: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed(Message):
    """The learner resumes from a checkpoint with this state.

    Sent after Welcome and before the first TakeBatch. If the journal of the service is ahead of the
    checkpoint, the service sends the batches of the missing updates again, in the same order.
    """

    policy_version: int
    service_sequence: int
    """Sequence number of the journal when the checkpoint was created."""
    groups_trained: int
    completions_trained: int
    tokens_trained: int
    recent_lease_ids: list[int]
    """Groups trained by the last updates; a journal that lost its tail may still list them."""
    notice: Prose = ""
    """Human-readable notice: newer checkpoints were damaged and skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareCheckpoint(Message):
    """Request to make the journal durable before a checkpoint is saved. See JournalDurable."""

    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved(Message):
    """A checkpoint is durable. Journal entries older than the oldest kept one can be dropped."""

    policy_version: int
    oldest_kept_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishRun(Message):
    """Training is over: evaluate the last version if `evaluate`, drain the actors, send Summary."""

    policy_version: int
    evaluate: bool
    reason: Prose
    stopped: bool = False
    """True if a user or a scheduler stopped the run before it was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAsked(Message):
    """A signal was received; FinishRun follows after the current update. For display only."""


# --- service -> learner -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalDurable(Message):
    """Reply to PrepareCheckpoint: the journal is durable up to this sequence number.

    0 without a journal.
    """

    policy_version: int
    service_sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReady(Message):
    """End of a batch: all of its groups were sent before this message."""

    policy_version: int
    lease_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMembers(Message):
    """Reply to PublishWeights: actors in rank order, from rank 1. A new epoch is a new group.

    Actor i has `ranks_each[i]` ranks; `world_size` counts all ranks, including the learner's.
    """

    policy_version: int
    epoch: int
    actor_names: list[str]
    ranks_each: list[int]
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipChanged(Message):
    """An actor needs weights, or members of the broadcast in progress are lost. The learner
    publishes its version to the actors that lack it."""

    reason: Prose
    lost: list[str]
    """Members of the broadcast in progress that were declared lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationBegan(Message):
    """A suite evaluates this version: its checkpoint is kept until EvaluationEnded."""

    suite: str
    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationEnded(Message):
    """Result of a suite. May be sent again, to a learner that reconnects."""

    suite: str
    policy_version: int
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPending(Message):
    """The requested batch is not complete, and generation makes progress. Sent at intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPending(Message):
    """The last evaluation is not complete, and generation makes progress. Sent at intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetReached(Message):
    """The held-out accuracy reached `run.stop_at_accuracy`."""

    accuracy: float
    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort(Message):
    """Another role failed: stop immediately. Sent to the learner and the actors."""

    role: str
    message: Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary(Message):
    """Last message of the service: its fields of `summary.json`."""

    fields: dict[str, object]
