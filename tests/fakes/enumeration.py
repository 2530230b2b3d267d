"""Exact expectations of a group's gradient estimate, by enumerating every outcome.

Each outcome uses the project's own gate, advantages and choice of screening samples. Only the
policies are synthetic: a few possible answers, each with its probability and its score.

Shape legend: N completions of one group, A possible answers of T tokens each, D parameters.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from speed_async.algorithms.advantages import Advantages, rloo
from speed_async.algorithms.loss_tokens import Correction, LossTokens
from speed_async.algorithms.screening import Choice, kept
from speed_async.config.sections.gate import GateConfig
from speed_async.types import PASS_REWARD

Floats = NDArray[np.float64]
Keep = Callable[[NDArray[np.float64]], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """Distributions over completions: of the learner, and of the two behaviour policies."""

    rewards_A: Floats
    logprobs_AT: Floats  # the learner's policy
    screening_logprobs_AT: Floats  # a: sampled the screening completions
    continuation_logprobs_AT: Floats  # b: sampled the others
    scores_ATD: Floats  # d logprobs_AT / d parameters

    @property
    def gradient_D(self) -> Floats:
        """Gradient of the expected reward."""
        return (probabilities(self.logprobs_AT) * self.rewards_A) @ self.scores_ATD.sum(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """Maps a group's outcome to a gradient estimate."""

    gate: GateConfig
    choice: Choice = "none"
    advantages: Advantages = rloo
    correction: Correction | None = None
    """None: the unmodified ratio pi_theta / mu of the whole completion."""
    keep: Keep | None = None
    """Replaces the project's own choice of samples."""
    opens: Callable[[Floats], bool] | None = None
    """Replaces the project's own gate; receives the screening rewards."""
    survives: Callable[[Floats], bool] = lambda rewards_N: True
    """A later selection; receives the rewards of the whole group."""

    def coefficients_N(self, rewards_N: Floats) -> Floats:
        """kept x advantage of each completion; all zero for an untrained group."""
        if not (self._is_open(rewards_N) and self.survives(rewards_N)):
            return np.zeros(len(rewards_N))
        return self._kept(rewards_N) * self.advantages([rewards_N])[0]

    def _is_open(self, rewards_N: Floats) -> bool:
        screened = rewards_N[: self.gate.num_screening]
        if self.opens is not None:
            return self.opens(screened)
        if self.gate.mode == "off":
            return True
        return self.gate.admits(int((screened >= PASS_REWARD).sum()), len(screened))

    def _kept(self, rewards_N: Floats) -> NDArray[np.bool_]:
        if self.keep is not None:
            return self.keep(rewards_N)
        return kept(rewards_N >= PASS_REWARD, self.gate.num_screening, self.gate, self.choice)


def probabilities(logprobs_AT: Floats) -> Floats:
    return np.exp(logprobs_AT.sum(axis=1))


def pass_or_fail(*, p: float, p_a: float | None = None, p_b: float | None = None) -> Policies:
    """Reward 1 with probability sigmoid(theta) = p. The score of an outcome y is y - p."""

    def logprobs(q: float | None) -> Floats:
        q = p if q is None else q
        return np.log([[1 - q], [q]])

    return Policies(
        rewards_A=np.array([0.0, 1.0]),
        logprobs_AT=logprobs(p),
        screening_logprobs_AT=logprobs(p_a),
        continuation_logprobs_AT=logprobs(p_b),
        scores_ATD=np.array([[[-p]], [[1 - p]]]),
    )


def one_of(
    rewards: Sequence[float],
    probs: Sequence[float],
    screening_probs: Sequence[float] | None = None,
    continuation_probs: Sequence[float] | None = None,
) -> Policies:
    """Softmax over the answers, one parameter each. The score of answer y is onehot(y) - probs."""

    def logprobs(given: Sequence[float] | None) -> Floats:
        return np.log(np.asarray(probs if given is None else given, dtype=np.float64))[:, None]

    return Policies(
        rewards_A=np.asarray(rewards, dtype=np.float64),
        logprobs_AT=logprobs(probs),
        screening_logprobs_AT=logprobs(screening_probs),
        continuation_logprobs_AT=logprobs(continuation_probs),
        scores_ATD=(np.eye(len(rewards)) - np.asarray(probs))[:, None, :],
    )


def two_tokens(rewards: Sequence[float], learner: Floats, behaviour: Floats) -> Policies:
    """Answers 00, 01, 10, 11. A policy consists of three probabilities of a 1, each with its own
    logit: of the first token, of the second after a 0, and of the second after a 1."""
    first, second = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])

    def logprobs(ones: Floats) -> Floats:
        return np.log(
            np.stack(
                [np.where(first, ones[0], 1 - ones[0]), np.abs(1 - second - ones[1 + first])], 1
            )
        )

    scores_ATD = np.zeros((4, 2, 3))
    scores_ATD[:, 0, 0] = first - learner[0]
    scores_ATD[np.arange(4), 1, 1 + first] = second - learner[1 + first]
    return Policies(
        rewards_A=np.asarray(rewards, dtype=np.float64),
        logprobs_AT=logprobs(learner),
        screening_logprobs_AT=logprobs(behaviour),
        continuation_logprobs_AT=logprobs(behaviour),
        scores_ATD=scores_ATD,
    )


TRIAL = GateConfig(n_init=3, n_cont=2)
PARTIAL_CREDIT = one_of(rewards=(0.0, 0.5, 1.0), probs=(0.2, 0.7, 0.1))


def expected_terms(policies: Policies, estimator: Estimator) -> Floats:
    """Expectation of each completion's term (N, D), over all A^N outcomes."""
    num_screening = estimator.gate.num_screening
    terms_ND = np.zeros((estimator.gate.group_size, policies.scores_ATD.shape[2]))
    steps_NAD = _steps(policies, estimator)
    for outcome_N, probability in _outcomes(policies, estimator.gate.group_size, num_screening):
        coefficients_N = estimator.coefficients_N(policies.rewards_A[outcome_N])
        steps_ND = steps_NAD[np.arange(len(outcome_N)), outcome_N]
        terms_ND += probability * coefficients_N[:, None] * steps_ND
    return terms_ND


def total(policies: Policies, estimator: Estimator) -> Floats:
    """Expected estimate (D,) of the whole group."""
    return expected_terms(policies, estimator).sum(axis=0)


def cosine(policies: Policies, estimator: Estimator) -> float:
    """Cosine between the expected estimate and the true gradient."""
    estimate, truth = total(policies, estimator), policies.gradient_D
    return float(estimate @ truth / math.sqrt(estimate @ estimate * (truth @ truth)))


def expected_coefficients(
    *, p: float, estimator: Estimator, p_a: float | None = None, p_b: float | None = None
) -> tuple[float, float]:
    """Expected term of one screening and of one continuation sample, in units of dp/dtheta.

    Rewards are binary. Outcomes are grouped by (passes in screening, passes in continuation), whose
    terms are equal by symmetry. A part without samples has coefficient 0.
    """
    policies = pass_or_fail(p=p, p_a=p_a, p_b=p_b)
    num_screening = estimator.gate.num_screening
    num_rest = estimator.gate.group_size - num_screening
    steps_NA = _steps(policies, estimator)[:, :, 0]
    sums = np.zeros(2)
    for k_a, k_b in itertools.product(range(num_screening + 1), range(num_rest + 1)):
        probability = binomial(num_screening, k_a, p if p_a is None else p_a) * binomial(
            num_rest, k_b, p if p_b is None else p_b
        )
        outcome_N = np.repeat([1, 0, 1, 0], [k_a, num_screening - k_a, k_b, num_rest - k_b])
        terms_N = estimator.coefficients_N(outcome_N.astype(np.float64))
        terms_N *= steps_NA[np.arange(len(outcome_N)), outcome_N]
        sums += probability * np.array(
            [terms_N[:num_screening].sum(), terms_N[num_screening:].sum()]
        )
    screening, rest = sums / np.maximum([num_screening, num_rest], 1) / policies.gradient_D[0]
    return float(screening), float(rest)


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def gate_probability(gate: GateConfig, p: float) -> float:
    """P(low < k / n < high) for binomial k, with n screening samples."""
    n = gate.num_screening
    return sum(binomial(n, k, p) for k in range(n + 1) if gate.low < k / n < gate.high)


def kept_probability(gate: GateConfig, p: float) -> float:
    """P(the gate opens regardless of one given screening sample): with j passes among the other
    n - 1, both j / n and (j + 1) / n are in the band."""
    n = gate.num_screening
    in_band = [gate.low < k / n < gate.high for k in range(n + 1)]
    return sum(binomial(n - 1, j, p) for j in range(n) if in_band[j] and in_band[j + 1])


def _steps(policies: Policies, estimator: Estimator) -> Floats:
    """Importance weight x score (N, A, D) of every answer at every position in the group."""
    num_screening = estimator.gate.num_screening
    num_rest = estimator.gate.group_size - num_screening
    behaviours = [policies.screening_logprobs_AT, policies.continuation_logprobs_AT]
    steps = [
        np.einsum(
            "at,atd->ad", _weights(policies, mu_AT, estimator.correction), policies.scores_ATD
        )
        for mu_AT in behaviours
    ]
    return np.repeat(np.stack(steps), [num_screening, num_rest], axis=0)


def _weights(policies: Policies, mu_AT: Floats, correction: Correction | None) -> Floats:
    """Weight (A, T) of every token of every answer sampled from `mu_AT`."""
    num_answers, num_tokens = mu_AT.shape
    if correction is None:
        ratios_A = probabilities(policies.logprobs_AT) / probabilities(mu_AT)
        return np.repeat(ratios_A[:, None], num_tokens, axis=1)
    tokens = LossTokens(
        logprobs_N=torch.from_numpy(policies.logprobs_AT.ravel()),
        behaviour_logprobs_N=torch.from_numpy(mu_AT.ravel()),
        advantages_N=torch.ones(mu_AT.size, dtype=torch.float64),
        ages_N=torch.ones(mu_AT.size, dtype=torch.int64),
        sequence_ids_N=torch.arange(num_answers).repeat_interleave(num_tokens),
        num_sequences=num_answers,
    )
    return correction(tokens).weights_N.numpy().reshape(mu_AT.shape)


def _outcomes(
    policies: Policies, group_size: int, num_screening: int
) -> Iterator[tuple[NDArray[np.int64], float]]:
    """Every outcome (N,) of answer numbers with its probability under a and b."""
    screening_A = probabilities(policies.screening_logprobs_AT)
    continuation_A = probabilities(policies.continuation_logprobs_AT)
    for outcome in itertools.product(range(len(policies.rewards_A)), repeat=group_size):
        outcome_N = np.array(outcome)
        screened, rest = outcome_N[:num_screening], outcome_N[num_screening:]
        yield outcome_N, float(screening_A[screened].prod() * continuation_A[rest].prod())
