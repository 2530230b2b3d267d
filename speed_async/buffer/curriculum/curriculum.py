"""Which prompts are leased next."""

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from speed_async.buffer.curriculum.posterior import PosteriorCurriculum
from speed_async.buffer.curriculum.random_state import pack_rng, unpack_rng
from speed_async.config.schema import Config


class Curriculum(Protocol):
    def choose(self, num_prompts: int) -> list[int]:
        """Exactly that many prompts to lease; none twice in one call while there are enough, and
        none at all when every prompt is retired."""
        ...

    def give_back(self, prompt_id: int) -> None:
        """The lease of this prompt came to nothing: offer it again soon."""
        ...

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """The lease ended with these completions, screening and continuation together; none
        when it failed in a way it would fail again."""
        ...

    def retire(self, prompt_id: int) -> None:
        """The prompt cannot be used: never choose it again."""
        ...

    @property
    def num_left(self) -> int:
        """Prompts that are not retired."""
        ...

    def advance(self, policy_version: int) -> None:
        """There is a new policy version."""
        ...


class UniformCurriculum:
    """Shuffled epochs over all prompts, as in SPEED; returned prompts go first."""

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
        taken: set[int] = set()
        twice: list[int] = []
        while len(chosen) < num_prompts:
            prompt_id = self._next()
            if prompt_id in taken and len(taken) < self.num_left:
                twice.append(prompt_id)
            else:
                chosen.append(prompt_id)
                taken.add(prompt_id)
        self._epoch.extendleft(reversed(twice))
        return chosen

    def _next(self) -> int:
        """There must be one that is not retired."""
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
        """Uniform choice does not look at results."""

    def advance(self, policy_version: int) -> None:
        """Nor at versions."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything, random generator included."""
        return {
            "num_prompts": np.array(self._num_prompts),
            "epoch": np.array(self._epoch, np.int64),
            "returned": np.array(self._returned, np.int64),
            "retired": np.array(sorted(self._retired), np.int64),
            "rng": pack_rng(self._rng),
        }

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Go on exactly where `state()` was taken. ValueError: it is of another data set."""
        if int(state["num_prompts"]) != self._num_prompts:
            raise ValueError(
                f"curriculum state of {int(state['num_prompts'])} prompts, not {self._num_prompts}"
            )
        self._epoch = deque(state["epoch"].tolist())
        self._returned = deque(state["returned"].tolist())
        self._retired = set(state["retired"].tolist())
        unpack_rng(self._rng, state["rng"])


def make_curriculum(
    config: Config, num_prompts: int, rng: np.random.Generator
) -> UniformCurriculum | PosteriorCurriculum:
    """The curriculum that `curriculum.kind` names."""
    if config.curriculum.kind == "uniform":
        return UniformCurriculum(num_prompts, rng)
    return PosteriorCurriculum(num_prompts, rng, gate=config.gate, settings=config.curriculum)
