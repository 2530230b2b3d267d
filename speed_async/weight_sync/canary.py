"""The canary: a fixed prompt whose log-probabilities tell whether a version arrived right.

The learner evaluates it under its new weights, the numbers travel in the manifest, and whoever
loaded the version evaluates it too. A checksum of the weights says that the bytes came; only a
forward pass says that the engine computes with them (a head that kept an old packed copy does not).

Shape legend: T canary tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from speed_async.errors import WeightSyncError

CANARY_TOKENS = 32
MAX_CANARY_TOKENS = 4096
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.3
"""Nats a token. A row of bfloat16 logits is rounded by up to 1/256 of its size, by each kernel in
its own way; the learner's numbers are float32."""
FULL_PRECISION = ("float32", "float64")
REMEDY = (
    "the engine does not compute with the weights that were sent (a tensor that was not loaded, a "
    "tied or packed copy that stayed old, another model folder), or its arithmetic differs by more "
    "than weights.canary_tolerance allows: use one model folder for all roles, or raise that field "
    "where the difference is rounding"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """Token ids and what the learner makes of them. Raises WeightSyncError when malformed."""

    token_ids: tuple[int, ...]  # (T,), 2 <= T <= MAX_CANARY_TOKENS
    logprobs: tuple[float, ...]  # (T-1,) of tokens 1..T-1, temperature 1, untruncated, finite

    def __post_init__(self) -> None:
        if not 2 <= len(self.token_ids) <= MAX_CANARY_TOKENS:
            raise WeightSyncError(
                f"canary of {len(self.token_ids)} tokens, must be 2 to {MAX_CANARY_TOKENS}"
            )
        if len(self.logprobs) != len(self.token_ids) - 1:
            raise WeightSyncError(
                f"canary of {len(self.token_ids)} tokens with {len(self.logprobs)} "
                f"log-probabilities, must be {len(self.token_ids) - 1}"
            )
        for token_id in self.token_ids:
            if type(token_id) is not int or token_id < 0:
                raise WeightSyncError(f"canary with token id {str(token_id)[:100]}")
        for logprob in self.logprobs:
            if type(logprob) is not float or not isfinite(logprob):
                raise WeightSyncError(f"canary with log-probability {str(logprob)[:100]}")


def canary_token_ids(
    vocabulary_size: int, *, context_length: int, length: int = CANARY_TOKENS, seed: int = 0
) -> tuple[int, ...]:
    """The same min(length, context_length) ids for the same arguments.

    One from each equal stretch of the vocabulary, in random order, so that no part of the
    embeddings goes untouched for long.
    """
    chance = random.Random(seed)
    count = min(length, context_length)
    token_ids = [int((i + chance.random()) * vocabulary_size / count) for i in range(count)]
    chance.shuffle(token_ids)
    return tuple(token_ids)


def canary_tolerance(configured: float | None, dtype: object) -> float:
    """Nats a token. `configured` is `weights.canary_tolerance`; None takes what rounding in the
    engine's `dtype` (a torch dtype, or its name) can explain."""
    if configured is not None:
        return configured
    name = str(dtype).removeprefix("torch.")
    return FLOAT32_TOLERANCE if name in FULL_PRECISION else HALF_TOLERANCE


def verify(
    canary: Canary, measured: Sequence[float], *, tolerance: float, policy_version: int
) -> float:
    """Mean absolute difference, in nats a token, of `measured` (T-1,) from the canary's numbers.

    Raises WeightSyncError when it is above `tolerance`, or when a measured value is not finite.
    The mean is what counts, because it tells rounding from wrong weights: in half precision one
    unlikely token may be off by many times what the others are, while wrong weights move nearly
    every token.
    """
    if len(measured) != len(canary.logprobs):
        raise WeightSyncError(
            f"policy version {policy_version}: {len(measured)} log-probabilities were measured for "
            f"a canary of {len(canary.logprobs)}"
        )
    if num_wrong := sum(not isfinite(value) for value in measured):
        raise WeightSyncError(
            f"policy version {policy_version} is refused, its canary failed: {num_wrong} of "
            f"{len(measured)} log-probabilities are not finite here and all were at the learner; "
            f"{REMEDY}"
        )
    differences = [abs(a - b) for a, b in zip(measured, canary.logprobs, strict=True)]
    mean = sum(differences) / len(differences)
    if not mean <= tolerance:
        raise WeightSyncError(
            f"policy version {policy_version} is refused, its canary failed: log-probabilities "
            f"differ from the learner's by {mean:.3g} nats a token (largest "
            f"{max(differences):.3g}), more than the tolerance of {tolerance:.3g}; {REMEDY}"
        )
    return mean
