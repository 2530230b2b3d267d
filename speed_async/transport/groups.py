"""A group as one message: its completions are concatenated. Packing, unpacking, validation.

Shape legend: P prompt tokens, N completions, S sum of completion lengths.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from speed_async.errors import ProtocolError
from speed_async.transport.messages import GroupFinished
from speed_async.types import MAX_REWARD, ActorCounts, Completion, Group, Sampled

MAX_LOGPROB = 1e-4
"""Tolerance above 0 for rounding errors of engines."""
_MAX_LOGPROB_BITS = int(np.float32(MAX_LOGPROB).view(np.int32))
_MIN_LOGPROB_BITS = int(np.finfo(np.float32).min.view(np.uint32))
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupBounds:
    """Limits that only the service knows. The defaults are the int32 range."""

    completion_tokens: int = _UNBOUNDED
    largest_token_id: int = _UNBOUNDED
    newest_version: int = _UNBOUNDED


NO_BOUNDS = GroupBounds()


def pack_group(group: Group, counts: ActorCounts) -> GroupFinished:
    """Build the message that reports `group`, with the current `counts` of the actor."""
    samples = [completion.sampled for completion in group.completions]
    rewards = [completion.reward for completion in group.completions]
    passed = [completion.passed for completion in group.completions]
    return GroupFinished(
        counts=counts,
        lease_id=group.lease_id,
        prompt_id=group.prompt_id,
        num_screening=group.num_screening,
        prompt_token_ids=group.prompt_token_ids,  # (P,)
        lengths=np.array([sampled.num_tokens for sampled in samples], np.int32),  # (N,)
        rewards=np.array(rewards, np.float32),  # (N,)
        passed=np.array(passed, np.int32),  # (N,)
        cut=np.array([sampled.finish_reason == "length" for sampled in samples], np.int32),  # (N,)
        token_ids=np.concatenate([sampled.token_ids for sampled in samples]),  # (S,)
        logprobs=np.concatenate([sampled.logprobs for sampled in samples]),  # (S,)
        policy_versions=np.concatenate([sampled.policy_versions for sampled in samples]),  # (S,)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStats:
    """Statistics of a group for the service; each equals the `Group` property of that name."""

    num_completions: int
    num_passed: int
    screening_pass_rate: float | None
    num_rewarded: int
    """Completions that passed or have a reward above 0."""
    num_truncated: int
    num_truncated_passed: int
    lowest_reward: float
    highest_reward: float
    oldest_version: int
    mean_version: float
    """Mean over the tokens."""

    @property
    def pass_rate(self) -> float:
        return self.num_passed / self.num_completions

    @property
    def unselected_pass_rate(self) -> float:
        """Pass rate of the completions that the gate did not select: those of screening, or all
        completions without a gate."""
        screened = self.screening_pass_rate
        return self.pass_rate if screened is None else screened


def validate_group(message: GroupFinished, bounds: GroupBounds = NO_BOUNDS) -> GroupStats:
    """Validate a group and compute its statistics without building its completions.

    Raises ProtocolError as `unpack_group` does, and when the group exceeds `bounds`.
    """
    columns = _Columns.of(message)
    newest = _check_group(message, columns, bounds)
    versions = message.policy_versions
    oldest = int(_smallest(versions))
    rewards, passed, cut = columns.rewards, columns.passed, columns.cut
    num_screening = message.num_screening
    return GroupStats(
        num_completions=len(passed),
        num_passed=sum(passed),
        screening_pass_rate=sum(passed[:num_screening]) / num_screening if num_screening else None,
        num_rewarded=sum([p or r > 0.0 for p, r in zip(passed, rewards, strict=True)]),
        num_truncated=sum(cut),
        num_truncated_passed=sum([p & c for p, c in zip(passed, cut, strict=True)]),
        lowest_reward=min(rewards),
        highest_reward=max(rewards),
        oldest_version=oldest,
        mean_version=float(oldest if oldest == newest else versions.mean()),
    )


def unpack_group(message: GroupFinished) -> Group:
    """Build the group of a message. Its arrays are views of the arrays of the message.

    Raises ProtocolError when values are inconsistent or out of range.
    """
    columns = _Columns.of(message)
    _check_group(message, columns, NO_BOUNDS)
    ends = np.cumsum(message.lengths, dtype=np.int64).tolist()
    starts = [0, *ends[:-1]]
    completions = tuple(
        Completion(
            sampled=Sampled(
                token_ids=message.token_ids[start:end],
                logprobs=message.logprobs[start:end],
                policy_versions=message.policy_versions[start:end],
                finish_reason="length" if cut else "stop",
            ),
            reward=reward,
            passed=passed == 1,
        )
        for start, end, reward, passed, cut in zip(
            starts,
            ends,
            columns.rewards,
            columns.passed,
            columns.cut,
            strict=True,
        )
    )
    return Group(
        lease_id=message.lease_id,
        prompt_id=message.prompt_id,
        prompt_token_ids=message.prompt_token_ids,
        completions=completions,
        num_screening=message.num_screening,
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """The arrays with one item per completion, as lists: faster for so few items."""

    lengths: list[int]
    rewards: list[float]
    passed: list[int]
    cut: list[int]

    @classmethod
    def of(cls, message: GroupFinished) -> Self:
        return cls(
            message.lengths.tolist(),
            message.rewards.tolist(),
            message.passed.tolist(),
            message.cut.tolist(),
        )


_smallest, _largest = np.minimum.reduce, np.maximum.reduce


def _check_group(message: GroupFinished, columns: _Columns, bounds: GroupBounds) -> int:
    """Validate a group and return the newest version of its tokens. Raises ProtocolError."""
    # Viewed as unsigned, negative numbers exceed every bound.
    newest = int(_largest(message.policy_versions.view(np.uint32), initial=0))
    fault = _first_fault(message, columns, bounds, newest)
    if fault is not None:
        raise ProtocolError(f"group of lease {message.lease_id} is invalid: {fault}")
    return newest


def _first_fault(
    message: GroupFinished, columns: _Columns, bounds: GroupBounds, newest: int
) -> str | None:
    """Describe the first fault; None for a valid group.

    This runs for every group, so long arrays are read as few times as possible.
    """
    num_tokens = len(message.token_ids)
    lengths, rewards = columns.lengths, columns.rewards
    if not lengths:
        return "expected at least one completion"
    if not num_tokens:
        return "expected at least one token"
    if message.lease_id < 0 or message.prompt_id < 0:
        return "expected lease_id >= 0 and prompt_id >= 0"
    if not 0 <= message.num_screening <= len(lengths):
        return "expected 0 <= num_screening <= number of completions"
    if min(lengths) < 0:
        return "expected lengths >= 0"
    if sum(lengths) != num_tokens:
        return "expected lengths to sum to the number of tokens"
    if max(lengths) > bounds.completion_tokens:
        return f"a completion is longer than actors.max_new_tokens = {bounds.completion_tokens}"
    if len(rewards) != len(lengths):
        return "expected one reward per completion"
    if len(columns.passed) != len(lengths) or not _FLAGS.issuperset(columns.passed):
        return "expected one passed value (0 or 1) per completion"
    if len(columns.cut) != len(lengths) or not _FLAGS.issuperset(columns.cut):
        return "expected one cut value (0 or 1) per completion"
    if len(message.logprobs) != num_tokens:
        return "expected one logprob per token"
    if len(message.policy_versions) != num_tokens:
        return "expected one policy version per token"
    # Neither `min` nor `max` finds a NaN; a sum does.
    is_bounded = min(rewards) >= -MAX_REWARD and max(rewards) <= MAX_REWARD
    if not is_bounded or math.isnan(sum(rewards)):
        return f"expected rewards in [-{MAX_REWARD:g}, {MAX_REWARD:g}]"
    if not _are_logprobs(message.logprobs):
        return "expected logprobs finite and <= 0"
    return _token_fault(message, bounds, newest)


_FLAGS = frozenset((0, 1))


def _token_fault(message: GroupFinished, bounds: GroupBounds, newest: int) -> str | None:
    if newest > _UNBOUNDED:
        return "expected policy versions >= 0"
    if newest > bounds.newest_version:
        current = f"the current version {bounds.newest_version}"
        return f"policy version {newest} of a token is newer than {current}"
    for token_ids in (message.token_ids, message.prompt_token_ids):
        largest = int(_largest(token_ids.view(np.uint32), initial=0))
        if largest > _UNBOUNDED:
            return "expected token ids >= 0"
        if largest > bounds.largest_token_id:
            return f"token {largest} is not in the vocabulary of {bounds.largest_token_id + 1}"
    return None


def _are_logprobs(values: np.ndarray) -> bool:
    """Whether all values are finite and at most MAX_LOGPROB, computed on their bits (IEEE 754).

    Viewed as signed integers, positive floats keep their order, infinity and NaN are above them,
    and negative floats are below zero. Viewed as unsigned integers, negative floats are above
    positive ones and grow with their magnitude, up to minus infinity and the negative NaNs.
    """
    highest = _largest(values.view(np.int32))
    if highest > _MAX_LOGPROB_BITS:
        return False
    if highest < 0:  # all are negative: signed and unsigned order agree
        return int(highest) + 2**32 <= _MIN_LOGPROB_BITS
    return bool(_largest(values.view(np.uint32)) <= _MIN_LOGPROB_BITS)
