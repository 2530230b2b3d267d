"""What the diagnoses read: bounded windows over recent leases, groups and updates, and best values.

The service feeds them in journal order. Nothing here reads the clock.
"""

from collections import deque
from dataclasses import dataclass, field

from speed_async.buffer.ledger import failure_kind
from speed_async.transport import messages as m
from speed_async.transport.groups import GroupStats

WINDOW_COMPLETIONS = 512
WINDOW_LEASES = 128
WINDOW_UPDATES = 8
MIN_FALL = 0.1
"""A smaller fall below the best value is none."""
NOT_THE_PROMPTS = (m.DRAINED, m.STALE)
"""LeaseFailed reasons that are unrelated to the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The completions of one lease."""

    at_s: float
    num_completions: int
    num_rewarded: int
    """Completions with a known reward above 0. For a refused prompt: those that passed."""
    num_truncated: int


@dataclass(kw_only=True, slots=True)
class CompletionWindow:
    """The most recent completions: at least WINDOW_COMPLETIONS once that many exist."""

    num_completions: int = 0
    num_rewarded: int = 0
    num_truncated: int = 0
    outcomes: deque[Outcome] = field(default_factory=deque)

    def add(self, outcome: Outcome) -> None:
        if not outcome.num_completions:
            return
        self.outcomes.append(outcome)
        self._count(outcome, 1)
        while self.num_completions - self.outcomes[0].num_completions >= WINDOW_COMPLETIONS:
            self._count(self.outcomes.popleft(), -1)

    def span_s(self, now_s: float) -> float:
        """Time since the oldest outcome in the window."""
        return now_s - self.outcomes[0].at_s if self.outcomes else 0.0

    @property
    def truncated_share(self) -> float | None:
        return self.num_truncated / self.num_completions if self.num_completions else None

    def _count(self, outcome: Outcome, sign: int) -> None:
        self.num_completions += sign * outcome.num_completions
        self.num_rewarded += sign * outcome.num_rewarded
        self.num_truncated += sign * outcome.num_truncated


@dataclass(kw_only=True, slots=True)
class FailureWindow:
    """Results and failure kinds of the most recent leases of one kind."""

    kinds: deque[str | None] = field(default_factory=deque)
    examples: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = deque(self.kinds, maxlen=WINDOW_LEASES)

    def add(self, reason: str | None) -> None:
        """`reason` of a failure, or None for a result."""
        kind = None if reason is None else failure_kind(reason)
        self.kinds.append(kind)
        if reason is not None and kind is not None and kind not in self.examples:
            self.examples = {k: v for k, v in self.examples.items() if k in self.kinds}
            self.examples[kind] = reason

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def num_failed(self) -> int:
        return sum(kind is not None for kind in self.kinds)

    @property
    def share(self) -> float:
        return self.num_failed / len(self.kinds) if self.kinds else 0.0

    def most_common(self) -> tuple[int, str]:
        """Count of the most frequent failure kind, and its first example."""
        kinds = [kind for kind in self.kinds if kind is not None]
        kind = max(dict.fromkeys(kinds), key=kinds.count)
        return kinds.count(kind), self.examples[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRecord:
    skipped: bool
    """The update was not finite."""
    has_gradient: bool
    at_s: float
    late_s: float
    """Time that its batch waited for groups that it would have made stale."""


@dataclass(kw_only=True, slots=True)
class Updates:
    """Counters over all updates of the run."""

    num_made: int = 0
    num_skipped: int = 0
    num_learned: int = 0
    """Updates with a finite, nonzero gradient."""
    covers_all_updates: bool = True
    """False after resuming from a checkpoint whose updates the journal does not contain."""
    recent: deque[UpdateRecord] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.recent = deque(self.recent, maxlen=WINDOW_UPDATES)

    def add(self, message: m.Trained, *, late_s: float, now_s: float) -> None:
        # Without a reported gradient norm, assume that there was a gradient.
        grad_norm = message.metrics.get("grad_norm")
        has_gradient = not message.skipped and grad_norm != 0.0
        self.num_made += 1
        self.num_skipped += message.skipped
        self.num_learned += has_gradient
        self.recent.append(
            UpdateRecord(
                skipped=message.skipped, has_gradient=has_gradient, at_s=now_s, late_s=late_s
            )
        )

    @property
    def late_share(self) -> float:
        """Share of the time between the recent updates in which a full batch waited for groups that
        it would have made stale."""
        if len(self.recent) < WINDOW_UPDATES:
            return 0.0
        first, *others = self.recent
        span_s = others[-1].at_s - first.at_s
        return sum(update.late_s for update in others) / span_s if span_s > 0 else 0.0

    @property
    def nothing_learned(self) -> bool:
        return self.covers_all_updates and self.num_made > 0 and not self.num_learned


@dataclass(kw_only=True, slots=True)
class Evidence:
    training: CompletionWindow = field(default_factory=CompletionWindow)
    held_out: CompletionWindow = field(default_factory=CompletionWindow)
    training_failures: FailureWindow = field(default_factory=FailureWindow)
    held_out_failures: FailureWindow = field(default_factory=FailureWindow)
    updates: Updates = field(default_factory=Updates)
    max_reward_ranges: int
    reward_ranges: deque[tuple[float, float]] = field(default_factory=deque)
    """Lowest and highest reward of each recent group."""

    def __post_init__(self) -> None:
        self.reward_ranges = deque(self.reward_ranges, maxlen=self.max_reward_ranges)

    def group(self, facts: GroupStats, now_s: float) -> None:
        self.training_failures.add(None)
        self.reward_ranges.append((facts.lowest_reward, facts.highest_reward))
        self.training.add(
            Outcome(
                at_s=now_s,
                num_completions=facts.num_completions,
                num_rewarded=facts.num_rewarded,
                num_truncated=facts.num_truncated,
            )
        )

    def screened_out(self, message: m.ScreenedOut, now_s: float) -> None:
        self.training_failures.add(None)
        self.training.add(_outcome(message, now_s))

    def evaluated(self, message: m.Evaluated, now_s: float) -> None:
        if message.num_unscored:
            total = message.num_completions
            reason = f"verifier: {message.num_unscored} of {total} completions have no verdict"
            self.held_out_failures.add(reason)
        else:
            self.held_out_failures.add(None)
        self.held_out.add(_outcome(message, now_s))

    def failed(self, reason: str, *, training: bool) -> None:
        if reason not in NOT_THE_PROMPTS:
            (self.training_failures if training else self.held_out_failures).add(reason)


def _outcome(message: m.ScreenedOut | m.Evaluated, now_s: float) -> Outcome:
    return Outcome(
        at_s=now_s,
        num_completions=message.num_completions,
        num_rewarded=message.num_passed,
        num_truncated=message.num_truncated,
    )


@dataclass(kw_only=True, slots=True)
class RunningBest:
    """The best value of a metric so far, and its policy version."""

    value: float | None = None
    policy_version: int = 0

    def update(self, value: float, policy_version: int) -> None:
        if self.value is None or value > self.value:
            self.value, self.policy_version = value, policy_version

    def drop(self, value: float | None, share: float) -> str:
        """Describe a drop below that share of the best; empty if there is none or it is unknown."""
        if (
            value is None
            or self.value is None
            or value >= share * self.value
            or self.value - value < MIN_FALL
        ):
            return ""
        return f"fell from {self.value:.3f} (version {self.policy_version}) to {value:.3f}"


@dataclass(kw_only=True, slots=True)
class Peaks:
    """Best values so far, from which a collapse is measured."""

    best_pass_rate: RunningBest = field(default_factory=RunningBest)
    best_accuracy: RunningBest = field(default_factory=RunningBest)
    last_accuracy: float | None = None
