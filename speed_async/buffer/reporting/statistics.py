"""Counters, windows and time shares that describe the run's speed and health."""

from collections import deque
from dataclasses import dataclass, field
from typing import Self

from speed_async.buffer.priority import BufferedGroup
from speed_async.observability.rates import WindowedMean, WindowedRate

RATE_WINDOW_S = 10.0
ACCEPTANCE_WINDOW = 256
"""Screened prompts in the running acceptance rate."""
PRIOR_ACCEPTANCE = 0.5
PRIOR_PROMPTS = 16
"""Acceptance assumed before any data, and its weight in prompts."""
TRUNCATION_ENDS = ("screened_out", "kept", "evaluated")
"""Ends of leases by which truncated completions are counted; `kept` groups passed the gate."""
SHARE_WINDOW = 10
"""Number of updates in the running shares of the learner's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateTimes:
    """Durations of one update, measured by the learner except for `starved_s`."""

    wait_s: int | float
    starved_s: int | float
    """Part of the wait during which the buffer had too few groups, measured by the service."""
    train_s: int | float
    sync_s: int | float
    checkpoint_s: int | float
    """For the checkpoint before this update."""

    @property
    def total_s(self) -> float:
        return self.wait_s + self.train_s + self.sync_s + self.checkpoint_s

    @property
    def parts_s(self) -> dict[str, float]:
        """The total time, split by what the learner waited for."""
        starved_s = min(self.starved_s, self.wait_s)
        return {
            "actor": starved_s,
            "buffer": self.wait_s - starved_s,
            "learner": self.train_s,
            "sync": self.sync_s,
            "checkpoint": self.checkpoint_s,
        }


@dataclass(kw_only=True, slots=True)
class TruncationCounts:
    """Completions of leases with the same end, and those that a length limit truncated."""

    num_completions: int = 0
    num_truncated: int = 0
    num_passed: int = 0
    """Truncated completions that passed."""
    recent: WindowedMean = field(default_factory=lambda: _mean())
    """Share of truncated completions in each of the last leases."""

    def add(self, num_completions: int, num_truncated: int, num_passed: int) -> None:
        self.num_completions += num_completions
        self.num_truncated += num_truncated
        self.num_passed += num_passed
        self.recent.add(num_truncated / max(num_completions, 1))


def _rate(started_s: float) -> WindowedRate:
    return WindowedRate(window_s=RATE_WINDOW_S, start_s=started_s)


def _mean() -> WindowedMean:
    return WindowedMean(num_values=ACCEPTANCE_WINDOW)


@dataclass(kw_only=True, slots=True)
class RunStatistics:
    started_s: float
    """Start of the run's first process."""
    generated: WindowedRate
    trained: WindowedRate
    tokens_generated: int = 0
    tokens_trained: int = 0
    first_token_s: float | None = None
    num_screened: int = 0
    num_accepted: int = 0
    prompts_seen: set[int] = field(default_factory=set)
    prompts_accepted: set[int] = field(default_factory=set)
    accuracy_first: float | None = None
    accuracy_first_version: int | None = None
    accuracy_last: float | None = None
    accuracy_last_version: int | None = None
    staleness_last_mean: float | None = None
    staleness_max: int | None = None
    truncation: dict[str, TruncationCounts] = field(
        default_factory=lambda: {end: TruncationCounts() for end in TRUNCATION_ENDS}
    )
    recent_accepted: WindowedMean = field(default_factory=_mean)
    recent_pass_rates: WindowedMean = field(default_factory=_mean)
    recent_times: deque[UpdateTimes] = field(default_factory=deque)
    learner_parts_s: dict[str, float] = field(default_factory=dict)
    """Sum of `UpdateTimes.parts_s` over all updates."""
    staleness_sum: float = 0.0
    staleness_tokens: int = 0

    def __post_init__(self) -> None:
        self.recent_times = deque(self.recent_times, maxlen=SHARE_WINDOW)

    @classmethod
    def begin(cls, started_s: float) -> Self:
        """The statistics of a run that starts now."""
        return cls(started_s=started_s, generated=_rate(started_s), trained=_rate(started_s))

    def screened(self, prompt_id: int, *, accepted: bool, pass_rate: float) -> None:
        self.num_screened += 1
        self.num_accepted += accepted
        self.prompts_seen.add(prompt_id)
        if accepted:
            self.prompts_accepted.add(prompt_id)
        self.recent_accepted.add(float(accepted))
        self.recent_pass_rates.add(pass_rate)

    def tokens(self, now_s: float, generated: int, trained: int) -> None:
        """Record the current totals of the ledger."""
        if generated and self.first_token_s is None:
            self.first_token_s = now_s
        self.generated.add(now_s, generated - self.tokens_generated)
        self.trained.add(now_s, trained - self.tokens_trained)
        self.tokens_generated, self.tokens_trained = generated, trained

    def generated_per_s(self, now_s: float) -> float | None:
        return self.generated.per_s(now_s)

    def trained_per_s(self, now_s: float) -> float | None:
        return self.trained.per_s(now_s)

    def batch_taken(self, groups: list[BufferedGroup], policy_version: int) -> None:
        tokens = sum(group.num_tokens for group in groups)
        total = sum((policy_version - group.mean_version) * group.num_tokens for group in groups)
        self.staleness_sum += total
        self.staleness_tokens += tokens
        self.staleness_last_mean = total / max(tokens, 1)
        oldest = min(group.oldest_version for group in groups)
        self.staleness_max = max(self.staleness_max or 0, policy_version - oldest)

    def updated(self, times: UpdateTimes) -> None:
        self.recent_times.append(times)
        _add(self.learner_parts_s, times.parts_s)

    def evaluated(self, accuracy: float, policy_version: int) -> None:
        if self.accuracy_first is None:
            self.accuracy_first, self.accuracy_first_version = accuracy, policy_version
        self.accuracy_last, self.accuracy_last_version = accuracy, policy_version

    @property
    def gate_acceptance(self) -> float | None:
        return self.recent_accepted.mean

    @property
    def num_recently_screened(self) -> int:
        """Number of prompts in `gate_acceptance` and `reward_mean`."""
        return len(self.recent_accepted)

    @property
    def expected_yield(self) -> float:
        """Expected groups per lease: the running acceptance, shrunk towards PRIOR_ACCEPTANCE while
        few prompts have been screened."""
        seen = len(self.recent_accepted)
        accepted = seen * (self.recent_accepted.mean or 0.0)
        return (accepted + PRIOR_ACCEPTANCE * PRIOR_PROMPTS) / (seen + PRIOR_PROMPTS)

    @property
    def gate_acceptance_overall(self) -> float | None:
        return self.num_accepted / self.num_screened if self.num_screened else None

    @property
    def reward_mean(self) -> float | None:
        """Mean pass rate of recent prompts before the gate: of the screening samples, or of whole
        groups without a gate. None before the first prompt."""
        return self.recent_pass_rates.mean

    @property
    def staleness_mean(self) -> float | None:
        """Mean staleness in versions over all trained tokens."""
        return self.staleness_sum / self.staleness_tokens if self.staleness_tokens else None

    def shares(self) -> dict[str, float]:
        """Share of the learner's recent time per component. The shares sum to 1."""
        parts_s: dict[str, float] = {}
        for times in self.recent_times:
            _add(parts_s, times.parts_s)
        total_s = sum(parts_s.values())
        return {name: part_s / total_s for name, part_s in parts_s.items()} if total_s > 0 else {}

    def bottleneck(self) -> str:
        shares = self.shares()
        return max(shares, key=lambda name: shares[name]) if shares else "starting"

    def eta_s(self, updates_left: int) -> float | None:
        if not self.recent_times:
            return None
        mean = sum(times.total_s for times in self.recent_times) / len(self.recent_times)
        return mean * updates_left


def _add(sums_s: dict[str, float], parts_s: dict[str, float]) -> None:
    for name, part_s in parts_s.items():
        sums_s[name] = sums_s.get(name, 0.0) + part_s
