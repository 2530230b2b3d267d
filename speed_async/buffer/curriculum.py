"""Which prompt is leased next."""

from collections import deque
from typing import Protocol

import numpy as np


class Curriculum(Protocol):
    def next_prompt(self) -> int:
        """The prompt to work on next; there always is one."""
        ...

    def give_back(self, prompt_id: int) -> None:
        """The lease of this prompt failed: offer it again soon."""
        ...

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """What sampling this prompt showed."""
        ...


class UniformCurriculum:
    """Shuffled epochs over all prompts, as in SPEED; returned prompts go first."""

    def __init__(self, num_prompts: int, rng: np.random.Generator) -> None:
        self._num_prompts = num_prompts
        self._rng = rng
        self._epoch: deque[int] = deque()
        self._returned: deque[int] = deque()

    def next_prompt(self) -> int:
        if self._returned:
            return self._returned.popleft()
        if not self._epoch:
            self._epoch.extend(self._rng.permutation(self._num_prompts).tolist())
        return self._epoch.popleft()

    def give_back(self, prompt_id: int) -> None:
        self._returned.append(prompt_id)

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """Uniform choice does not look at results."""
