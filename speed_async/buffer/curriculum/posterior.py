"""Thompson sampling of the prompts most likely to pass the gate, plus a share of uniform sampling.

Shape legend: N all prompts, K some of them.
"""

from collections import deque
from dataclasses import dataclass, field
from math import gcd
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speed_async.buffer.curriculum.beliefs import Beliefs, BeliefsState, GateAcceptance, IntArray
from speed_async.buffer.durability.encoding import SavedGenerator, SavedUint8
from speed_async.config.sections.curriculum import CurriculumConfig
from speed_async.config.sections.gate import GateConfig
from speed_async.errors import JournalError

FREE, OUTCOME_BASED, INDEPENDENT, RETIRED = 0, 1, 2, 3
"""Lease state of a prompt: not leased, leased because of its own outcomes, leased independently of
them, or retired (never leased refill)."""
MIN_SEEN = 1024
"""Number of seen prompts from which half of the candidates are drawn from them. With fewer, the
same prompts would be trained repeatedly while millions wait."""
WALK_BLOCK = 64


@dataclass(kw_only=True, slots=True)
class CycleState:
    """The next i of this epoch, its start and its stride."""

    next: int
    start: int = 0
    stride: int = 1


class PermutationCycle:
    """Every prompt once per epoch, in an order that needs no memory: start + i x stride mod N.

    A stride coprime to N makes it a full cycle. Each epoch draws a new start and stride.
    """

    def __init__(self, num_prompts: int, rng: np.random.Generator, state: CycleState) -> None:
        self._num_prompts = num_prompts
        self._rng = rng
        self._state = state

    def take(self, num: int, lease_N: NDArray[np.uint8]) -> IntArray:
        """The next `num` free prompts. At least `num` prompts must be free."""
        taken: list[IntArray] = []
        while num > 0:
            self._begin_epoch_when_due()
            state = self._state
            ends = min(state.next + max(2 * num, WALK_BLOCK), self._num_prompts)
            steps = np.arange(state.next, ends)
            prompts = (state.start + steps * state.stride) % self._num_prompts
            free = np.flatnonzero(lease_N[prompts] == FREE)[:num]
            state.next = int(steps[free[-1]] if len(free) == num else steps[-1]) + 1
            lease_N[prompts[free]] = INDEPENDENT
            taken.append(prompts[free])
            num -= len(free)
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _begin_epoch_when_due(self) -> None:
        state = self._state
        if state.next == self._num_prompts:
            state.stride = int(self._rng.integers(1, self._num_prompts + 1))
            while gcd(state.stride, self._num_prompts) != 1:
                state.stride = int(self._rng.integers(1, self._num_prompts + 1))
            state.next, state.start = 0, int(self._rng.integers(self._num_prompts))


@dataclass(kw_only=True, slots=True)
class PosteriorState:
    rng: SavedGenerator
    beliefs: BeliefsState
    cycle: CycleState
    lease_N: SavedUint8
    returned: deque[int] = field(default_factory=deque)
    num_chosen: int = 0
    num_walked: int = 0

    @classmethod
    def new(cls, num_prompts: int, rng: np.random.Generator) -> Self:
        return cls(
            rng=rng,
            beliefs=BeliefsState.new(num_prompts),
            cycle=CycleState(next=num_prompts),
            lease_N=np.zeros(num_prompts, np.uint8),
        )


class PosteriorCurriculum:
    """Leases the most informative prompts. Needs 17 bytes per prompt."""

    def __init__(
        self,
        num_prompts: int,
        state: PosteriorState,
        *,
        gate: GateConfig,
        settings: CurriculumConfig,
    ) -> None:
        """Raises JournalError if the state is not that of `num_prompts` prompts."""
        self.beliefs = Beliefs(num_prompts, gate, settings.half_life_updates, state.beliefs)
        if state.lease_N.shape != (num_prompts,):
            raise JournalError(
                f"the snapshot does not fit: {len(state.lease_N)} prompts, expected {num_prompts}"
            )
        self._num_prompts = num_prompts
        self._state = state
        self._rng = state.rng
        self._odds = GateAcceptance(gate)
        self._settings = settings
        self._walk = PermutationCycle(num_prompts, state.rng, state.cycle)
        self._lease_N = state.lease_N
        self._returned = state.returned
        self._num_retired = int(np.count_nonzero(self._lease_N == RETIRED))
        self._num_leased = int(np.count_nonzero(self._lease_N)) - self._num_retired

    @property
    def num_bytes(self) -> int:
        """Total size of all arrays in bytes."""
        return self.beliefs.num_bytes + self._lease_N.nbytes

    @property
    def num_left(self) -> int:
        return self._num_prompts - self._num_retired

    def choose(self, num_prompts: int) -> list[int]:
        """Returned prompts first, then the uniform share, then the best of random candidates.

        A leased prompt is chosen refill only when no other prompt is left.
        """
        if not self.num_left:
            return []
        chosen = [self._returned.popleft() for _ in range(min(num_prompts, len(self._returned)))]
        num_fresh = min(num_prompts - len(chosen), self._num_free)
        num_walked = self._uniform_share_of(num_fresh)
        chosen += self._walk.take(num_walked, self._lease_N).tolist()
        self._num_leased += num_walked
        chosen += self._most_promising(num_fresh - num_walked)
        return chosen + self._repeated_leases(num_prompts - len(chosen), chosen)

    def give_back(self, prompt_id: int) -> None:
        """Put the prompt first in the next choice. Until then it is not leased refill."""
        if self._is_leased(prompt_id):
            self._returned.append(prompt_id)

    def record(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        """Learn from every completion of a lease. Zero completions only end the lease."""
        if num_completions:
            if self._lease_N[prompt_id] == INDEPENDENT:
                self.beliefs.prior.add(num_passed, num_completions)
            self.beliefs.add(prompt_id, num_passed, num_completions)
        if self._is_leased(prompt_id):
            self._lease_N[prompt_id] = FREE
            self._num_leased -= 1

    def retire(self, prompt_id: int) -> None:
        """Retire the prompt from any lease state."""
        if self._lease_N[prompt_id] == RETIRED:
            return
        if prompt_id in self._returned:
            self._returned.remove(prompt_id)
        self._num_leased -= bool(self._lease_N[prompt_id] != FREE)
        self._lease_N[prompt_id] = RETIRED
        self._num_retired += 1

    def advance(self, policy_version: int) -> None:
        self.beliefs.advance(policy_version)

    @property
    def _num_free(self) -> int:
        return self._num_prompts - self._num_leased - self._num_retired

    def _is_leased(self, prompt_id: int) -> bool:
        """Whether an actor holds the lease. A returned prompt waits for the next choice."""
        return (
            self._lease_N[prompt_id] in (OUTCOME_BASED, INDEPENDENT)
            and prompt_id not in self._returned
        )

    def _uniform_share_of(self, num_fresh: int) -> int:
        """Number of these choices in the uniform share. Fractions carry over to later choices."""
        self._state.num_chosen += num_fresh
        due = (
            int(self._settings.uniform_share * self._state.num_chosen + 1e-9)
            - self._state.num_walked
        )
        num_walked = min(max(due, 0), num_fresh)
        self._state.num_walked += num_walked
        return num_walked

    def _most_promising(self, num: int) -> list[int]:
        """Draw one theta from each candidate's posterior (Thompson 1933) and keep the best odds."""
        if num == 0:
            return []
        pool_K = self._candidates(num)
        theta_K = self._rng.beta(*self.beliefs.posterior(pool_K))
        order_K = np.argsort(-self._odds(theta_K), kind="stable")
        best = pool_K[order_K[:num]]
        # A prompt without outcomes cannot have been chosen because of them.
        self._lease_N[best] = np.where(self.beliefs.unseen(best), INDEPENDENT, OUTCOME_BASED)
        self._num_leased += num
        return best.tolist()

    def _candidates(self, num: int) -> IntArray:
        """About candidates x num free prompts, (K,), at least `num`. As many must be free."""
        wanted = self._settings.candidates * num
        num_free = self._num_free
        if 2 * wanted > num_free or 2 * num_free < self._num_prompts:
            free = np.flatnonzero(self._lease_N == FREE)
            return self._rng.choice(free, min(wanted, num_free), replace=False, shuffle=False)
        pool_K = np.zeros(0, np.int64)
        while len(pool_K) < num:
            drawn = np.unique(np.concatenate((pool_K, self._draw(wanted))))
            pool_K = drawn[self._lease_N[drawn] == FREE]
        return pool_K

    def _draw(self, num: int) -> IntArray:
        """Draw half from all prompts and half from the seen ones, once MIN_SEEN are seen."""
        seen = self.beliefs.seen
        if len(seen) < MIN_SEEN:
            return self._rng.integers(self._num_prompts, size=num)
        known = seen[self._rng.integers(len(seen), size=num // 2)].astype(np.int64)
        anywhere = self._rng.integers(self._num_prompts, size=num - num // 2)
        return np.concatenate((anywhere, known))

    def _repeated_leases(self, num: int, chosen: list[int]) -> list[int]:
        """Fill up when there are more leases than prompts: unchosen prompts first, then any."""
        if num <= 0:
            return []
        usable = np.flatnonzero(self._lease_N != RETIRED)
        others = np.setdiff1d(usable, chosen)
        refill = np.concatenate((self._rng.permutation(others), self._rng.permutation(usable)))
        return np.resize(refill, num).tolist()
