"""Held-out evaluation as leases: when it is due, what is left to sample, what came out."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Mean pass rate over all held-out prompts, and which versions sampled it."""

    policy_version: int
    """The version that was asked for."""
    num_passed: int
    num_completions: int
    oldest_version: int | None
    """Of the tokens; None when there are none."""
    newest_version: int | None

    @property
    def accuracy(self) -> float:
        return self.num_passed / self.num_completions


class EvaluationPlan:
    """One evaluation at a time; a version that falls due while one runs is left out."""

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
        """Version under evaluation; None when none is."""
        return self._target

    @property
    def progress(self) -> tuple[int, int] | None:
        """Prompts done and in all, of the evaluation that runs."""
        if self._target is None:
            return None
        return self._num_prompts - self._num_open, self._num_prompts

    def due(self, policy_version: int) -> bool:
        return self._target is None and self._every > 0 and policy_version % self._every == 0

    def start(self, policy_version: int) -> None:
        """Begin. The one before must have ended: its late results would count for this one."""
        assert self._target is None, f"evaluation of version {self._target} still runs"
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
        """Count one prompt; returns the accuracy when it was the last one."""
        assert self._target is not None, "no evaluation runs"
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
        whole = Accuracy(
            policy_version=self._target,
            num_passed=sum(part.num_passed for part in self._results),
            num_completions=sum(part.num_completions for part in self._results),
            oldest_version=min(_known(part.oldest_version for part in self._results), default=None),
            newest_version=max(_known(part.newest_version for part in self._results), default=None),
        )
        self._target = None
        return whole


def _known(versions: Iterable[int | None]) -> list[int]:
    return [version for version in versions if version is not None]
