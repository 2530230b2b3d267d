"""Every message of the protocol but those of joining.py: flat, frozen, of plain values and arrays.

Fields are int, float, str, bool, list of those, `dict[str, float]`, `dict[str, object]` of plain
values (metrics), or numpy arrays (which travel as raw frames). Packed arrays of a group hold its
completions one after another; `lengths` says where each ends.

Shape legend: P prompt tokens, N completions, S sum of completion lengths.
"""

from dataclasses import dataclass

from speed_async.types import ActorCounts, Float32Array, Int32Array

PROTOCOL_VERSION = 7

DRAINED = "drained"
"""The reason of a LeaseFailed that says nothing about its prompt."""
UNUSABLE = "prompt"
"""Kind of the reason (`kind: text`) of a LeaseFailed whose prompt the model cannot take."""
STALE = "stale"
"""The reason of a LeaseFailed whose tokens grew too old before the group was whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """Base of all messages. The two numbers belong to the session (transport/session.py)."""

    number: int = 0
    """Place in what its sender tells this peer, from 1; 0 stands outside of the count."""
    heard: int = 0
    """Every message of the other side up to this number has come."""


# --- anyone -> service -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Message):
    """First message of a peer. Its fingerprints say which data and which model it holds."""

    role: str  # "actor" | "learner"
    index: int  # torchrun rank
    incarnation: int  # grows with every restart of the same rank
    fingerprint: str
    process_id: int
    model_fingerprint: str = ""
    """Of the model folder's settings, tokenizer and samples of its weights."""
    weight_ranks: int = 1
    """Consecutive ranks of the weight group that an actor's engine takes (tensor parallelism)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure(Message):
    """A role met an error that ends the run."""

    role: str
    message: str


# --- actor -> service (all carry the actor's counts) --------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted(Message):
    counts: ActorCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class WantWork(Counted):
    """How many leases the actor can take now, in all (it replaces any earlier want)."""

    num_prompts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFinished(Counted):
    """A full group that passed the gate."""

    lease_id: int
    prompt_id: int
    num_screening: int
    prompt_token_ids: Int32Array  # (P,)
    lengths: Int32Array  # (N,)
    rewards: Float32Array  # (N,)
    cut: Int32Array  # (N,) 1 where the completion ran into a length limit, else 0
    token_ids: Int32Array  # (S,)
    logprobs: Float32Array  # (S,)
    policy_versions: Int32Array  # (S,)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenedOut(Counted):
    """The gate refused a prompt: counts only."""

    lease_id: int
    num_passed: int
    num_completions: int
    num_truncated: int
    """Completions that ran into a length limit."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseFailed(Counted):
    """A lease of either kind ended without a result (verifier failure, drain, too long)."""

    lease_id: int
    reason: str
    num_completions: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(Counted):
    """A held-out prompt was sampled and scored."""

    lease_id: int
    num_passed: int
    num_completions: int
    num_truncated: int
    num_tokens: int
    oldest_version: int
    """Of the tokens; of no meaning, and 0, when there are none."""
    newest_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(Counted):
    """One completion for people to look at (the `sample` event of observability/metrics.py). It
    changes nothing in the run. `extracted` is empty where `is_extracted` is False."""

    policy_version: int
    prompt_id: int
    held_out: bool
    decision: str
    reward: float
    is_extracted: bool
    extracted: str
    truncated: bool
    num_tokens: int
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorReport(Counted):
    """Heartbeat with gauges (slots_busy, num_slots, waiting, loop_lag_s, policy_version, ...)."""

    gauges: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsApplied(Counted):
    """The actor now samples under this version. A negative version: `error` says why not."""

    policy_version: int
    epoch: int
    pause_s: float
    transfer_s: float
    error: str
    usable: bool = True
    """False: the engine holds no whole version any more, and this actor ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodbye(Counted):
    """Last message of an actor after it drained."""


# --- service -> actor ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome(Message):
    """Answer to Hello. A peer that joins late waits for weights when `policy_version` > 0."""

    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Leases(Message):
    """Granted work. Parallel lists; `num_samples` is 0 for training leases."""

    lease_ids: list[int]
    prompt_ids: list[int]
    kind: str  # LeaseKind
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferWeights(Message):
    """Take part in a broadcast; fields as in `types.WeightOffer`. `rank` is the actor's first."""

    policy_version: int
    epoch: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    backend: str
    deadline_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Drain(Message):
    """Abort what runs, report it, say Goodbye, exit."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected(Message):
    """A message of the peer was refused; the text says why."""

    reason: str


# --- learner -> service -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeBatch(Message):
    """Ask for `num_groups` groups fresh enough for `policy_version`; answered when there are."""

    policy_version: int
    num_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(Message):
    """One update is done: what it used, and its metrics. `skipped`: the step was non-finite."""

    policy_version: int  # version after the update
    lease_ids: list[int]
    skipped: bool
    groups_trained: int  # learner's own cumulative counts
    completions_trained: int
    tokens_trained: int
    metrics: dict[str, float]
    notice: str = ""
    """Something that a person should know of, such as a checkpoint that could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishWeights(Message):
    """The learner has a version to broadcast and asks who takes part."""

    policy_version: int
    store_host: str
    store_port: int
    backend: str
    deadline_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsPublished(Message):
    """A broadcast ended; `error` is empty when it succeeded, `missing` names who is to blame."""

    policy_version: int
    epoch: int
    transfer_s: float
    num_bytes: int
    error: str
    missing: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed(Message):
    """The learner goes on from a checkpoint: what that checkpoint knows of the run so far.

    Sent after Welcome, before the first TakeBatch. A service whose journal reaches further offers
    the batches of the missing updates again, the same ones in the same order.
    """

    policy_version: int
    service_sequence: int
    """Of the journal, when the checkpoint was made."""
    groups_trained: int
    completions_trained: int
    tokens_trained: int
    recent_lease_ids: list[int]
    """Groups trained by the last updates; a journal that lost its tail may still hold them."""
    notice: str = ""
    """What a person should know of: newer checkpoints were damaged and passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareCheckpoint(Message):
    """A checkpoint is to be made: what led to it must be durable first. See JournalDurable."""

    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved(Message):
    """A checkpoint is durable. What led to the oldest one that is kept is not needed any more."""

    policy_version: int
    oldest_kept_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishRun(Message):
    """No more training: evaluate the last version if asked, drain the actors, send Summary."""

    policy_version: int
    evaluate: bool
    reason: str
    stopped: bool = False
    """A person or a scheduler asked for it before the run was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAsked(Message):
    """A signal came: FinishRun follows when the update under way is done. For people to see."""


# --- service -> learner -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchGroup(Message):
    """One group of a batch; arrays as in GroupFinished."""

    lease_id: int
    prompt_id: int
    num_screening: int
    prompt_token_ids: Int32Array  # (P,)
    lengths: Int32Array  # (N,)
    rewards: Float32Array  # (N,)
    cut: Int32Array  # (N,) 1 where the completion ran into a length limit, else 0
    token_ids: Int32Array  # (S,)
    logprobs: Float32Array  # (S,)
    policy_versions: Int32Array  # (S,)


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalDurable(Message):
    """Answer to PrepareCheckpoint: the journal is on disk up to this place (0: none is kept)."""

    policy_version: int
    service_sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReady(Message):
    """All groups of the batch were sent before this."""

    policy_version: int
    lease_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMembers(Message):
    """Answer to PublishWeights: actors in rank order (rank 1 first); new epoch, new group.

    Actor i takes `ranks_each[i]` ranks; `world_size` counts all ranks and the learner's own.
    """

    policy_version: int
    epoch: int
    actor_names: list[str]
    ranks_each: list[int]
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipChanged(Message):
    """An actor needs weights; the learner publishes its present version to those without it."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetReached(Message):
    """The held-out accuracy that `run.stop_at_accuracy` asks for was measured."""

    accuracy: float
    policy_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort(Message):
    """Another role failed: stop at once. To learner and actors."""

    role: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary(Message):
    """The service's last word: everything it knows for `summary.json`."""

    fields: dict[str, object]
