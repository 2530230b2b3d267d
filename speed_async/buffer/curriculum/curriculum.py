"""Selection of the prompts to lease next."""

from collections import deque
from typing import Protocol

import numpy as np

from speed_async.buffer.curriculum.posterior import PosteriorCurriculum
from speed_async.config.schema import Config


class Curriculum(Protocol):
    def choose(self, num_prompts: int) -> list[int]:
        """Return exactly `num_prompts` prompts to lease. Prompts are distinct within one call while
        enough are left. Returns an empty list when every prompt is retired."""
        ...

    def give_back(self, prompt_id: int) -> None:
        """Return a prompt whose lease produced no result; it is offered again soon."""
        ...

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """Record the completions of a finished lease, screening and continuation together. Both
        counts are zero when the lease failed deterministically."""
        ...

    def retire(self, prompt_id: int) -> None:
        """Exclude an unusable prompt from all later choices."""
        ...

    @property
    def num_left(self) -> int:
        """Number of prompts that are not retired."""
        ...

    def advance(self, policy_version: int) -> None:
        """Report a new policy version."""
        ...


class UniformCurriculum:
    """Shuffled epochs over all prompts, as in SPEED. Returned prompts come first."""

    def __init__(self, num_prompts: int, rng: np.random.Generator) -> None:
        self._num_prompts = num_prompts
        self._rng = rng
        self._epoch: deque[int] = deque()
        self._returned: deque[int] = deque()
        self._retired: set[int] = set()

    @property
    def num_left(self) -> int:
        return self._num_prompts - len(self._retired)

    def choose(self, num_prompts: int) -> list[int]:
        if not self.num_left:
            return []
        chosen: list[int] = []
        chosen_set: set[int] = set()
        duplicates: list[int] = []
        while len(chosen) < num_prompts:
            prompt_id = self._next()
            if prompt_id in chosen_set and len(chosen_set) < self.num_left:
                duplicates.append(prompt_id)
            else:
                chosen.append(prompt_id)
                chosen_set.add(prompt_id)
        self._epoch.extendleft(reversed(duplicates))
        return chosen

    def _next(self) -> int:
        """At least one prompt must not be retired."""
        while True:
            if self._returned:
                prompt_id = self._returned.popleft()
            else:
                if not self._epoch:
                    self._epoch.extend(self._rng.permutation(self._num_prompts).tolist())
                prompt_id = self._epoch.popleft()
            if prompt_id not in self._retired:
                return prompt_id

    def give_back(self, prompt_id: int) -> None:
        self._returned.append(prompt_id)

    def retire(self, prompt_id: int) -> None:
        self._retired.add(prompt_id)

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """Ignored: uniform sampling does not depend on results."""

    def advance(self, policy_version: int) -> None:
        """Ignored: uniform sampling does not depend on versions."""


def make_curriculum(
    config: Config, num_prompts: int, rng: np.random.Generator
) -> UniformCurriculum | PosteriorCurriculum:
    """The curriculum selected by `curriculum.kind`."""
    if config.curriculum.kind == "uniform":
        return UniformCurriculum(num_prompts, rng)
    return PosteriorCurriculum(num_prompts, rng, gate=config.gate, settings=config.curriculum)
