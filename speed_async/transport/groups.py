"""A group as one message: its completions packed end to end, and what makes such a message true.

Shape legend: P prompt tokens, N completions, S sum of completion lengths.
"""

from dataclasses import dataclass

import numpy as np

from speed_async.errors import ProtocolError
from speed_async.transport.messages import BatchGroup, GroupFinished
from speed_async.types import PASS_REWARD, ActorCounts, Completion, Group, Sampled

MAX_LOGPROB = 1e-4
"""A log-probability is at most 0; engines round it to a little above."""
_MAX_LOGPROB_BITS = int(np.float32(MAX_LOGPROB).view(np.int32))
_MIN_LOGPROB_BITS = int(np.finfo(np.float32).min.view(np.uint32))
_NO_BOUND = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupBounds:
    """What only the service can hold a group to; the default is what an int32 can hold."""

    completion_tokens: int = _NO_BOUND
    largest_token_id: int = _NO_BOUND
    newest_version: int = _NO_BOUND


NO_BOUNDS = GroupBounds()


def pack_group(group: Group, counts: ActorCounts) -> GroupFinished:
    """The message that reports `group`, with the actor's `counts` at that moment."""
    samples = [completion.sampled for completion in group.completions]
    rewards = [completion.reward for completion in group.completions]
    return GroupFinished(
        counts=counts,
        lease_id=group.lease_id,
        prompt_id=group.prompt_id,
        num_screening=group.num_screening,
        prompt_token_ids=group.prompt_token_ids,  # (P,)
        lengths=np.array([sampled.num_tokens for sampled in samples], np.int32),  # (N,)
        rewards=np.array(rewards, np.float32),  # (N,)
        cut=np.array([sampled.finish_reason == "length" for sampled in samples], np.int32),  # (N,)
        token_ids=np.concatenate([sampled.token_ids for sampled in samples]),  # (S,)
        logprobs=np.concatenate([sampled.logprobs for sampled in samples]),  # (S,)
        policy_versions=np.concatenate([sampled.policy_versions for sampled in samples]),  # (S,)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStats:
    """What the service needs to know of a group; each as the property of `Group` of that name."""

    num_completions: int
    num_passed: int
    screening_pass_rate: float | None
    num_rewarded: int
    """Completions with a reward above 0."""
    num_truncated: int
    lowest_reward: float
    highest_reward: float
    oldest_version: int
    mean_version: float
    """Over the tokens."""

    @property
    def pass_rate(self) -> float:
        return self.num_passed / self.num_completions

    @property
    def unselected_pass_rate(self) -> float:
        """Of the completions that were sampled whatever the gate decided: those of screening, or
        all where there is no gate."""
        screened = self.screening_pass_rate
        return self.pass_rate if screened is None else screened


def validate_group(
    message: GroupFinished | BatchGroup, bounds: GroupBounds = NO_BOUNDS
) -> GroupStats:
    """The facts of a group, without making its completions. Raises ProtocolError as `unpack_group`
    does, and where the group passes the bounds."""
    newest = _check_group(message, bounds)
    versions = message.policy_versions
    oldest = int(_smallest(versions))
    rewards = message.rewards.tolist()
    passed = [reward >= PASS_REWARD for reward in rewards]
    num_screening = message.num_screening
    return GroupStats(
        num_completions=len(passed),
        num_passed=sum(passed),
        screening_pass_rate=sum(passed[:num_screening]) / num_screening if num_screening else None,
        num_rewarded=sum(reward > 0.0 for reward in rewards),
        num_truncated=sum(message.cut.tolist()),
        lowest_reward=min(rewards),
        highest_reward=max(rewards),
        oldest_version=oldest,
        mean_version=float(oldest if oldest == newest else versions.mean()),
    )


def unpack_group(message: GroupFinished | BatchGroup) -> Group:
    """The group of a message; its arrays are views of the message's.

    Raises ProtocolError when the numbers contradict each other or cannot be what they claim.
    """
    _check_group(message, NO_BOUNDS)
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
        )
        for start, end, reward, cut in zip(
            starts, ends, message.rewards.tolist(), message.cut.tolist(), strict=True
        )
    )
    return Group(
        lease_id=message.lease_id,
        prompt_id=message.prompt_id,
        prompt_token_ids=message.prompt_token_ids,
        completions=completions,
        num_screening=message.num_screening,
    )


def batch_group(message: GroupFinished, *, number: int = 0, heard: int = 0) -> BatchGroup:
    """The same group on its way to the learner; nothing is copied."""
    return BatchGroup(
        number=number,
        heard=heard,
        lease_id=message.lease_id,
        prompt_id=message.prompt_id,
        num_screening=message.num_screening,
        prompt_token_ids=message.prompt_token_ids,
        lengths=message.lengths,
        rewards=message.rewards,
        cut=message.cut,
        token_ids=message.token_ids,
        logprobs=message.logprobs,
        policy_versions=message.policy_versions,
    )


_smallest, _largest = np.minimum.reduce, np.maximum.reduce


def _check_group(message: GroupFinished | BatchGroup, bounds: GroupBounds) -> int:
    """The newest version of its tokens. Raises ProtocolError."""
    # As unsigned numbers negative ones are above every bound.
    newest = int(_largest(message.policy_versions.view(np.uint32), initial=0))
    broken = _first_fault(message, bounds, newest)
    if broken is not None:
        raise ProtocolError(f"group of lease {message.lease_id} breaks: {broken}")
    return newest


def _first_fault(
    message: GroupFinished | BatchGroup, bounds: GroupBounds, newest: int
) -> str | None:
    """What cannot be true; None for a sound group. The service does this for every group, so it
    reads each long array as seldom as it can; short ones are quicker as lists."""
    num_tokens = len(message.token_ids)
    lengths, rewards, cut = message.lengths.tolist(), message.rewards.tolist(), message.cut.tolist()
    if not lengths:
        return "it has completions"
    if not num_tokens:
        return "it has tokens"
    if message.lease_id < 0 or message.prompt_id < 0:
        return "lease_id >= 0, prompt_id >= 0"
    if not 0 <= message.num_screening <= len(lengths):
        return "0 <= num_screening <= completions"
    if min(lengths) < 0:
        return "lengths >= 0"
    if sum(lengths) != num_tokens:
        return "lengths sum to the tokens"
    if max(lengths) > bounds.completion_tokens:
        return f"a completion is longer than actors.max_new_tokens = {bounds.completion_tokens}"
    if len(rewards) != len(lengths):
        return "one reward a completion"
    if len(cut) != len(lengths) or not _MARKS.issuperset(cut):
        return "one cut mark of 0 or 1 a completion"
    if len(message.logprobs) != num_tokens:
        return "one logprob a token"
    if len(message.policy_versions) != num_tokens:
        return "one policy version a token"
    if not all(0.0 <= reward <= 1.0 for reward in rewards):
        return "rewards in [0, 1]"
    if not _are_logprobs(message.logprobs):
        return "logprobs finite and <= 0"
    return _token_fault(message, bounds, newest)


_MARKS = frozenset((0, 1))


def _token_fault(
    message: GroupFinished | BatchGroup, bounds: GroupBounds, newest: int
) -> str | None:
    if newest > _NO_BOUND:
        return "policy versions >= 0"
    if newest > bounds.newest_version:
        policy = f"the policy is at version {bounds.newest_version}"
        return f"a token's version = {newest} is from the future: {policy}"
    for token_ids in (message.token_ids, message.prompt_token_ids):
        largest = int(_largest(token_ids.view(np.uint32), initial=0))
        if largest > _NO_BOUND:
            return "token ids >= 0"
        if largest > bounds.largest_token_id:
            vocabulary = f"the vocabulary of {bounds.largest_token_id + 1}"
            return f"token {largest} is not in {vocabulary}"
    return None


def _are_logprobs(values: np.ndarray) -> bool:
    """Whether all are finite and at most MAX_LOGPROB, read from their bits (IEEE 754).

    As signed integers positive floats are ordered as they are, infinity and NaN above them, and
    negative ones lie below zero. As unsigned integers negative ones lie above positive ones, and
    grow with their magnitude, to minus infinity and the NaNs of that sign.
    """
    highest = _largest(values.view(np.int32))
    if highest > _MAX_LOGPROB_BITS:
        return False
    if highest < 0:  # all are negative, so signed and unsigned order are alike
        return int(highest) + 2**32 <= _MIN_LOGPROB_BITS
    return bool(_largest(values.view(np.uint32)) <= _MIN_LOGPROB_BITS)
