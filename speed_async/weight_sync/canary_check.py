"""The canary: a fixed prompt whose log-probabilities verify that an engine uses a new version.

The learner evaluates it under its new weights and sends the result in the manifest. Each engine
evaluates it after loading the version. The digests (see `digests.py`) verify that the weights are
those that were sent; a forward pass verifies that the engine computes with them, unlike a head with
a stale packed copy.

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
"""Nats per token. bfloat16 logits are rounded by up to 1/256 of their magnitude, differently in
each kernel; the learner's values are float32, or bfloat16 where its weights are."""
FULL_PRECISION = ("float32", "float64")
REMEDY = (
    "the engine does not compute with the weights that were sent (a tensor that was not loaded, a "
    "stale tied or packed copy, another model folder), or its rounding differs by more than "
    "weights.canary_tolerance allows: use one model folder for all roles, or raise that field "
    "if the difference is rounding"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """Token ids and the learner's log-probabilities. Raises WeightSyncError when malformed."""

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
    vocabulary_size: int, *, context_length: int, seed: int = 0
) -> tuple[int, ...]:
    """min(CANARY_TOKENS, context_length) token ids, deterministic in the arguments.

    One id is drawn from each of equally sized ranges of the vocabulary, in random order, so that
    the canary covers all parts of the embeddings.
    """
    rng = random.Random(seed)
    count = min(CANARY_TOKENS, context_length)
    token_ids = [int((i + rng.random()) * vocabulary_size / count) for i in range(count)]
    rng.shuffle(token_ids)
    return tuple(token_ids)


def canary_tolerance(configured: float | None, dtype: object) -> float:
    """Tolerance in nats per token. `configured` is `weights.canary_tolerance`; None uses the
    rounding error of the engine's `dtype` (a torch dtype, or its name)."""
    if configured is not None:
        return configured
    name = str(dtype).removeprefix("torch.")
    return FLOAT32_TOLERANCE if name in FULL_PRECISION else HALF_TOLERANCE


def verify(
    canary: Canary, measured: Sequence[float], *, tolerance: float, policy_version: int
) -> float:
    """Mean absolute difference, in nats per token, between `measured` (T-1,) and the canary.

    Raises WeightSyncError when it exceeds `tolerance`, or when a measured value is not finite.
    The mean distinguishes rounding from wrong weights. In half precision, a single unlikely token
    may differ much more than the others, while wrong weights change nearly every token.
    """
    if len(measured) != len(canary.logprobs):
        raise WeightSyncError(
            f"policy version {policy_version}: {len(measured)} log-probabilities were measured for "
            f"a canary of {len(canary.logprobs)}"
        )
    if num_wrong := sum(not isfinite(value) for value in measured):
        raise WeightSyncError(
            f"policy version {policy_version} is refused, its canary failed: {num_wrong} of "
            f"{len(measured)} log-probabilities are not finite here, and all are at the learner; "
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
