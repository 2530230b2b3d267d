"""Schedules held-out evaluations as leases and aggregates their results."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Mean pass rate over all held-out prompts, and the policy versions that sampled them."""

    policy_version: int
    """The version under evaluation."""
    num_passed: int
    num_completions: int
    oldest_version: int | None
    """Oldest and newest version of the tokens; None when there are none."""
    newest_version: int | None

    @property
    def accuracy(self) -> float:
        return self.num_passed / self.num_completions


class EvaluationPlan:
    """Runs one evaluation at a time; versions that become due meanwhile are skipped."""

    CONFIGURED = ("num_samples", "_every")

    def __init__(self, *, num_prompts: int, num_samples: int, every: int) -> None:
        self._num_prompts = num_prompts
        self.num_samples = num_samples
        self._every = every
        self._pending: deque[int] = deque()
        self._num_open = 0
        self._results: list[Accuracy] = []
        self._target: int | None = None

    @property
    def target_version(self) -> int | None:
        """Version under evaluation; None when no evaluation is running."""
        return self._target

    @property
    def progress(self) -> tuple[int, int] | None:
        """Finished and total prompts of the running evaluation."""
        if self._target is None:
            return None
        return self._num_prompts - self._num_open, self._num_prompts

    def due(self, policy_version: int) -> bool:
        return self._target is None and self._every > 0 and policy_version % self._every == 0

    def start(self, policy_version: int) -> None:
        """Start an evaluation. The previous one must be complete, so that results do not mix."""
        assert self._target is None, f"evaluation of version {self._target} is still running"
        self._target = policy_version
        self._pending = deque(range(self._num_prompts))
        self._num_open = self._num_prompts
        self._results = []

    def next_prompt(self) -> int | None:
        return self._pending.popleft() if self._pending else None

    def give_back(self, prompt_id: int) -> None:
        self._pending.append(prompt_id)

    def record(
        self,
        num_passed: int,
        num_completions: int,
        oldest_version: int | None,
        newest_version: int | None,
    ) -> Accuracy | None:
        """Record the result of one prompt; returns the accuracy after the last one."""
        assert self._target is not None, "no evaluation is running"
        self._results.append(
            Accuracy(
                policy_version=self._target,
                num_passed=num_passed,
                num_completions=num_completions,
                oldest_version=oldest_version,
                newest_version=newest_version,
            )
        )
        self._num_open -= 1
        if self._num_open:
            return None
        accuracy = Accuracy(
            policy_version=self._target,
            num_passed=sum(each.num_passed for each in self._results),
            num_completions=sum(each.num_completions for each in self._results),
            oldest_version=min(_known(each.oldest_version for each in self._results), default=None),
            newest_version=max(_known(each.newest_version for each in self._results), default=None),
        )
        self._target = None
        return accuracy


def _known(versions: Iterable[int | None]) -> list[int]:
    return [version for version in versions if version is not None]
