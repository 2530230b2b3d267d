"""Schedules held-out evaluations as leases and aggregates their results."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from speed_async.config.schema import EvaluateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Mean pass rate of the held-out completions that the verifier scored, and the policy versions
    that sampled them."""

    policy_version: int
    """The version under evaluation."""
    num_passed: int
    num_completions: int
    """Scored completions."""
    num_unscored: int
    """Completions without a verdict, because the verifier timed out or failed. They count neither
    as passed nor as failed."""
    oldest_version: int | None
    """Oldest and newest version of the tokens; None when there are none."""
    newest_version: int | None

    @property
    def accuracy(self) -> float:
        """0 if no completion was scored."""
        return self.num_passed / max(self.num_completions, 1)


@dataclass(kw_only=True, slots=True)
class EvaluationState:
    target: int | None = None
    """Version under evaluation; None when no evaluation is running."""
    pending: deque[int] = field(default_factory=deque)
    """Prompts to lease."""
    num_open: int = 0
    results: list[Accuracy] = field(default_factory=list)
    """One for each finished prompt."""
    evaluated_version: int | None = None
    """The last evaluated version; None before the first evaluation is complete."""


class EvaluationPlan:
    """Runs one evaluation at a time; versions that become due meanwhile are skipped."""

    def __init__(self, config: EvaluateConfig, num_prompts: int, state: EvaluationState) -> None:
        self.num_samples = config.num_samples
        self._every = config.every
        self._num_prompts = num_prompts
        self._state = state

    @property
    def target_version(self) -> int | None:
        """Version under evaluation; None when no evaluation is running."""
        return self._state.target

    @property
    def evaluated_version(self) -> int | None:
        """The last evaluated version; None before the first evaluation is complete."""
        return self._state.evaluated_version

    @property
    def progress(self) -> tuple[int, int] | None:
        """Finished and total prompts of the running evaluation."""
        if self._state.target is None:
            return None
        return self._num_prompts - self._state.num_open, self._num_prompts

    def due(self, policy_version: int) -> bool:
        """Whether to evaluate this version, which was published. It may be published again."""
        state = self._state
        if state.target is not None or policy_version == state.evaluated_version:
            return False
        return self._every > 0 and policy_version % self._every == 0

    def start(self, policy_version: int) -> None:
        """Start an evaluation. The previous one must be complete, so that results do not mix."""
        assert self._state.target is None, (
            f"evaluation of version {self._state.target} is still running"
        )
        self._state.target = policy_version
        self._state.pending = deque(range(self._num_prompts))
        self._state.num_open = self._num_prompts
        self._state.results = []

    def next_prompt(self) -> int | None:
        return self._state.pending.popleft() if self._state.pending else None

    def give_back(self, prompt_id: int) -> None:
        self._state.pending.append(prompt_id)

    def record(
        self,
        num_passed: int,
        num_completions: int,
        oldest_version: int | None,
        newest_version: int | None,
        *,
        num_unscored: int = 0,
    ) -> Accuracy | None:
        """Record the result of one prompt, with `num_completions` scored completions; returns the
        accuracy after the last one."""
        assert self._state.target is not None, "no evaluation is running"
        self._state.results.append(
            Accuracy(
                policy_version=self._state.target,
                num_passed=num_passed,
                num_completions=num_completions,
                num_unscored=num_unscored,
                oldest_version=oldest_version,
                newest_version=newest_version,
            )
        )
        self._state.num_open -= 1
        if self._state.num_open:
            return None
        accuracy = Accuracy(
            policy_version=self._state.target,
            num_passed=sum(each.num_passed for each in self._state.results),
            num_completions=sum(each.num_completions for each in self._state.results),
            num_unscored=sum(each.num_unscored for each in self._state.results),
            oldest_version=min(
                _known(each.oldest_version for each in self._state.results), default=None
            ),
            newest_version=max(
                _known(each.newest_version for each in self._state.results), default=None
            ),
        )
        self._state.evaluated_version, self._state.target = self._state.target, None
        return accuracy


def _known(versions: Iterable[int | None]) -> list[int]:
    return [version for version in versions if version is not None]
