"""Records shared by all packages. Torch-free, frozen, and without behaviour beyond counting.

Shape legend: P prompt tokens, T completion tokens.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
UInt64Array = NDArray[np.uint64]

FinishReason = Literal["stop", "length", "abort"]
WeightBackend = Literal["gloo", "nccl", "ipc"]

VerifierOutcome = Literal["scored", "timeout", "error"]
"""Of the verification of one completion."""

PASS_REWARD = 1.0
"""A completion passes when the reward that decides this (environments/rewards.py) reaches it;
partial credit is not a pass."""
MAX_REWARD = 1e6
"""Largest magnitude of a reward."""


class Phase(StrEnum):
    """Why a completion is generated; the engine prioritises continuation over screening."""

    SCREENING = "screening"
    CONTINUATION = "continuation"
    EVALUATION = "evaluation"


class LeaseKind(StrEnum):
    TRAINING = "training"
    EVALUATION = "evaluation"


class GroupEnd(StrEnum):
    """How a training group ends; each group ends exactly once."""

    TRAINED = "trained"
    STALE = "stale"
    EVICTED = "evicted"
    SCREENED_OUT = "screened_out"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    """Its actor was stopped before the group was complete; not a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem. `prompt_id` is its index in the task's train or held-out list."""

    prompt_id: int
    text: str
    answer: str
    level: str = ""
    """Difficulty label used only in reports."""
    held_out: bool = False
    metadata: dict[str, object] = field(default_factory=dict)
    """Additional input of the task's scorer beyond `answer` (plain data only)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The engine's result for one request: T tokens with log-probabilities and policy versions."""

    token_ids: Int32Array  # (T,)
    logprobs: Float32Array  # (T,) log mu, as sampled: temperature and truncation included
    policy_versions: Int32Array  # (T,) version whose weights sampled each token
    finish_reason: FinishReason

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A verifier's result for one completion."""

    reward: float
    """NaN if the outcome is not `scored`: the reward is then unknown, not 0."""
    passed: bool
    """Whether the completion is correct, for the gate, pass rates and accuracy. Format rewards and
    other bonuses do not change it."""
    parts: dict[str, float] = field(default_factory=dict)
    """Values that are logged by name: the rewards before weighting, and the parts of each."""
    extracted: str | None = None
    """The answer as the verifier extracted it; human-readable."""
    outcome: VerifierOutcome = "scored"
    error: str = ""
    """Why the completion has no reward; human-readable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A scored sample."""

    sampled: Sampled
    reward: float
    passed: bool
    """Whether it is correct; see `Verdict`."""
    parts: dict[str, float] = field(default_factory=dict)
    extracted: str | None = None
    """`parts` and `extracted` are those of the verdict. They are not sent with the group."""

    @property
    def num_tokens(self) -> int:
        return self.sampled.num_tokens

    @property
    def is_truncated(self) -> bool:
        """Whether a length limit ended it."""
        return self.sampled.finish_reason == "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All completions of one prompt under one lease; the first `num_screening` were screened."""

    lease_id: int
    prompt_id: int
    prompt_token_ids: Int32Array  # (P,)
    completions: tuple[Completion, ...]
    num_screening: int

    @property
    def num_tokens(self) -> int:
        """Generated tokens (prompt tokens are not counted anywhere in the ledger)."""
        return sum(completion.num_tokens for completion in self.completions)

    @property
    def num_passed(self) -> int:
        return sum(completion.passed for completion in self.completions)

    @property
    def pass_rate(self) -> float:
        return self.num_passed / len(self.completions)

    @property
    def oldest_version(self) -> int:
        """Smallest policy version among the tokens; the staleness bound applies to it."""
        return min(
            int(completion.sampled.policy_versions.min())
            for completion in self.completions
            if completion.num_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to work on one prompt once."""

    lease_id: int
    prompt_id: int
    kind: LeaseKind
    suite: str = ""
    """Suite of an evaluation lease; empty for training."""
    num_samples: int = 0
    """Completions of an evaluation lease."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorCounts:
    """An actor's own cumulative counts, sent with every message it sends.

    At the moment of sending: tokens_generated = tokens the actor has reported in ended leases
    (evaluation included) + tokens_in_flight. The service checks it against what it received.
    """

    groups_leased: int = 0
    groups_in_flight: int = 0
    groups_continuing: int = 0
    """Of those in flight, training groups that have passed the gate."""
    completions_generated: int = 0
    tokens_generated: int = 0
    tokens_in_flight: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightOffer:
    """An invitation to join one weight broadcast. Rank 0 is the sender.

    Members of one `epoch` share one process group; each epoch has its own group.
    """

    policy_version: int
    epoch: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    backend: WeightBackend
    deadline_s: float
