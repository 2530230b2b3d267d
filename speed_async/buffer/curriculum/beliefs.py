"""Posterior beliefs about each prompt's pass rate theta, and the resulting gate acceptance.

Shape legend: N all prompts, K some of them, S screening completions, G completions of a group.
"""

from dataclasses import dataclass, field
from math import comb
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speed_async.buffer.durability.encoding import SavedFloat32, SavedFloat64, SavedInt32
from speed_async.config.sections.gate import GateConfig
from speed_async.errors import JournalError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating]

PRIOR_WEIGHT = 8.0
"""Weight of the initial Beta(1, 1) in the fit of the shared prior, in prompts."""
WEAKEST_PRIOR, STRONGEST_PRIOR = 0.05, 50.0
"""Bounds of the shared prior's strength, in pseudo-completions. Moments of few prompts can yield
any value."""
NEVER = -1


class GateAcceptance:
    """P(gate passes | theta) = sum of Binomial(S, k, theta) over k with low < k / S < high."""

    def __init__(self, gate: GateConfig) -> None:
        size = gate.num_screening
        passing = [k for k in range(size + 1) if gate.admits(k, size)]
        refused = [k for k in range(size + 1) if k not in passing]
        self._size = size
        self.passing = passing
        # Sum over the smaller set: a wide gate on large groups refuses only two outcomes.
        self._complement = len(refused) < len(passing)
        self._terms = refused if self._complement else passing

    def __call__(self, theta_K: FloatArray) -> FloatArray:
        """(K,) probabilities from (K,) pass rates."""
        rest_K = 1.0 - theta_K
        total_K = np.zeros_like(theta_K)
        for k in self._terms:
            total_K += comb(self._size, k) * theta_K**k * rest_K ** (self._size - k)
        return 1.0 - total_K if self._complement else total_K


def _initial_sums() -> SavedFloat64:
    return np.array([PRIOR_WEIGHT, PRIOR_WEIGHT / 2, PRIOR_WEIGHT / 3])


@dataclass(kw_only=True, slots=True)
class PriorState:
    sums: SavedFloat64 = field(default_factory=_initial_sums)
    """Discounted number of prompts and sums of their two moments, initially of Beta(1, 1)."""


class SharedPrior:
    """Beta(a, b) over the prompts' pass rates, fitted online by moments with a forgetting factor.

    For a prompt with k passes among S completions, k / S and k(k - 1) / (S(S - 1)) are unbiased
    estimates of theta and theta^2. Their means m1, m2 over prompts give a = m1 s, b = (1 - m1) s
    with s = (m1 - m2) / (m2 - m1^2) (the factorial moments of the beta-binomial: Skellam 1948). Add
    only prompts that were not chosen because of their own outcomes.

    The continuation of an accepted group depends on its k, so counts over the whole group are
    biased. Given the group's total, each order of outcomes that passes the gate is equally likely
    under any theta. Hence the expected moments of the screening part (Rao-Blackwell) follow a
    hypergeometric distribution, truncated to the passing k.
    """

    def __init__(self, gate: GateConfig, half_life_updates: float, state: PriorState) -> None:
        self._state = state
        self._half_life = half_life_updates
        self._size = gate.num_screening
        self._refused_moments = [self._moments_of(k) for k in range(self._size + 1)]
        self._group_size = gate.group_size
        self._group_moments = _screening_moments(gate, self._refused_moments)

    def _moments_of(self, passed: int) -> tuple[float, float]:
        size = self._size
        return passed / size, passed * (passed - 1) / max(size * (size - 1), 1)

    def add(self, num_passed: int, num_completions: int) -> None:
        """Add one prompt's outcome: of its screening, or of a whole group that passed the gate."""
        if num_completions == self._size:
            moments = self._refused_moments[num_passed]
        elif num_completions == self._group_size:
            moments = self._group_moments[num_passed]
        else:
            return
        self._state.sums += (1.0, *moments)

    def discount(self, num_updates: int) -> None:
        """Discount like the outcomes; the lost weight returns to the initial prior."""
        start = _initial_sums()
        self._state.sums = start + (self._state.sums - start) * 0.5 ** (
            num_updates / self._half_life
        )

    @property
    def sums(self) -> FloatArray:
        return self._state.sums

    @property
    def parameters(self) -> tuple[float, float]:
        """(a, b)."""
        weight, first, second = self._state.sums.tolist()
        mean, square = first / weight, second / weight
        spread = max(square - mean * mean, 1e-9)
        strength = min(max((mean - square) / spread, WEAKEST_PRIOR), STRONGEST_PRIOR)
        mean = min(max(mean, 1e-3), 1 - 1e-3)
        return mean * strength, (1 - mean) * strength


def _screening_moments(
    gate: GateConfig, moments: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Expected moments of the screening part for 0 .. G passes of a group that passed the gate."""
    rest = gate.group_size - gate.num_screening
    passing = GateAcceptance(gate).passing
    table = []
    for total in range(gate.group_size + 1):
        ways = {
            k: comb(gate.num_screening, k) * comb(rest, total - k) for k in passing if k <= total
        }
        orders = max(sum(ways.values()), 1)
        first = sum(moments[k][0] * count for k, count in ways.items()) / orders
        second = sum(moments[k][1] * count for k, count in ways.items()) / orders
        table.append((first, second))
    return table


@dataclass(kw_only=True, slots=True)
class BeliefsState:
    policy_version: int = 0
    prior: PriorState = field(default_factory=PriorState)
    passes_N: SavedFloat32
    fails_N: SavedFloat32
    last_version_N: SavedInt32
    seen_N: SavedInt32
    num_seen: int = 0

    @classmethod
    def new(cls, num_prompts: int) -> Self:
        return cls(
            passes_N=np.zeros(num_prompts, np.float32),
            fails_N=np.zeros(num_prompts, np.float32),
            last_version_N=np.full(num_prompts, NEVER, np.int32),
            seen_N=np.zeros(num_prompts, np.int32),
        )


class Beliefs:
    """A discounted Beta posterior of every prompt: 12 bytes each, 4 more for the list of seen ones.

    Effective counts are the stored counts x 2^(-(version - last) / half_life_updates). Every
    completion counts, of refused and accepted groups alike: whether it was sampled depended only on
    earlier outcomes, and such a stopping rule does not change the likelihood of theta.
    """

    def __init__(
        self, num_prompts: int, gate: GateConfig, half_life_updates: float, state: BeliefsState
    ) -> None:
        """Raises JournalError if the state is not that of `num_prompts` prompts."""
        self.prior = SharedPrior(gate, half_life_updates, state.prior)
        self._half_life = half_life_updates
        self._state = state
        self._passes_N, self._fails_N = state.passes_N, state.fails_N
        self._last_version_N, self._seen_N = state.last_version_N, state.seen_N
        for array in (self._passes_N, self._fails_N, self._last_version_N, self._seen_N):
            if array.shape != (num_prompts,):
                raise JournalError(
                    f"the snapshot does not fit: {len(array)} prompts, expected {num_prompts}"
                )

    @property
    def policy_version(self) -> int:
        return self._state.policy_version

    @property
    def num_bytes(self) -> int:
        arrays = (self._passes_N, self._fails_N, self._last_version_N, self._seen_N)
        return sum(array.nbytes for array in arrays)

    @property
    def seen(self) -> NDArray[np.int32]:
        """Prompts with at least one outcome, in order of their first outcome."""
        return self._seen_N[: self._state.num_seen]

    def unseen(self, prompts_K: IntArray) -> NDArray[np.bool_]:
        return self._last_version_N[prompts_K] == NEVER

    def advance(self, policy_version: int) -> None:
        """Move to a newer version. An older or equal version has no effect."""
        newer = policy_version - self.policy_version
        if newer > 0:
            self.prior.discount(newer)
            self._state.policy_version = policy_version

    def add(self, prompt_id: int, num_passed: int, num_completions: int) -> None:
        last = int(self._last_version_N[prompt_id])
        if last == NEVER:
            self._seen_N[self._state.num_seen] = prompt_id
            self._state.num_seen += 1
        kept = 0.5 ** ((self.policy_version - last) / self._half_life)
        num_failed = num_completions - num_passed
        self._passes_N[prompt_id] = self._passes_N[prompt_id] * kept + num_passed
        self._fails_N[prompt_id] = self._fails_N[prompt_id] * kept + num_failed
        self._last_version_N[prompt_id] = self.policy_version

    def posterior(self, prompts_K: IntArray) -> tuple[FloatArray, FloatArray]:
        """(K,) alpha and (K,) beta of the current Beta posteriors of (K,) prompts."""
        a, b = self.prior.parameters
        age_K = self.policy_version - self._last_version_N[prompts_K]
        kept_K = np.exp2(-age_K / self._half_life)
        return a + self._passes_N[prompts_K] * kept_K, b + self._fails_N[prompts_K] * kept_K
