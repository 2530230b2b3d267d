"""Selection of the prompts to lease next."""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from speed_async.buffer.curriculum.posterior import PosteriorCurriculum, PosteriorState
from speed_async.buffer.durability.encoding import SavedGenerator
from speed_async.config.schema import Config
from speed_async.errors import JournalError


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


@dataclass(kw_only=True, slots=True)
class UniformState:
    rng: SavedGenerator
    epoch: list[int] = field(default_factory=list)
    """Prompts left in this epoch, the next one last."""
    returned: deque[int] = field(default_factory=deque)
    retired: set[int] = field(default_factory=set)


CurriculumState = UniformState | PosteriorState


class UniformCurriculum:
    """Shuffled epochs over all prompts, as in SPEED. Returned prompts come first."""

    def __init__(self, num_prompts: int, state: UniformState) -> None:
        self._num_prompts = num_prompts
        self._state = state
        self._retired = state.retired

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
        self._state.epoch.extend(reversed(duplicates))
        return chosen

    def _next(self) -> int:
        """At least one prompt must not be retired."""
        state = self._state
        while True:
            if state.returned:
                prompt_id = state.returned.popleft()
            else:
                if not state.epoch:
                    state.epoch = state.rng.permutation(self._num_prompts)[::-1].tolist()
                prompt_id = state.epoch.pop()
            if prompt_id not in self._retired:
                return prompt_id

    def give_back(self, prompt_id: int) -> None:
        self._state.returned.append(prompt_id)

    def retire(self, prompt_id: int) -> None:
        self._retired.add(prompt_id)

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """Ignored: uniform sampling does not depend on results."""

    def advance(self, policy_version: int) -> None:
        """Ignored: uniform sampling does not depend on versions."""


def new_curriculum_state(config: Config, num_prompts: int) -> CurriculumState:
    """The state of the curriculum of a new run."""
    rng = np.random.default_rng(config.run.seed)
    if config.curriculum.kind == "uniform":
        return UniformState(rng=rng)
    return PosteriorState.new(num_prompts, rng)


def make_curriculum(config: Config, num_prompts: int, state: CurriculumState) -> Curriculum:
    """The curriculum selected by `curriculum.kind`. Raises JournalError if the state is that of
    another kind or of another number of prompts."""
    kind = config.curriculum.kind
    if kind == "uniform" and isinstance(state, UniformState):
        return UniformCurriculum(num_prompts, state)
    if kind == "posterior" and isinstance(state, PosteriorState):
        gate = config.gate
        if gate.mode == "off":  # the best groups are those whose rewards differ
            gate = gate.model_copy(update={"mode": "filter", "low": 0.0, "high": 1.0})
        return PosteriorCurriculum(num_prompts, state, gate=gate, settings=config.curriculum)
    raise JournalError(f"the snapshot does not fit curriculum.kind = {kind!r}")
