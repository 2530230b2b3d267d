"""A group as one message: its completions packed end to end, and what makes such a message true.

Shape legend: P prompt tokens, N completions, S sum of completion lengths.
"""

from dataclasses import dataclass

import numpy as np

from speed_async.errors import ProtocolError
from speed_async.types import PASS_REWARD, ActorCounts, Completion, Group, Sampled
from speed_async.wire.messages import BatchGroup, GroupFinished

MAX_LOGPROB = 1e-4
"""A log-probability is at most 0; engines round it to a little above."""
MIN_LOGPROB = float(np.finfo(np.float32).min)
"""The lowest finite one."""


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
class GroupFacts:
    """What the service needs to know of a group; each as the property of `Group` of that name."""

    num_completions: int
    num_passed: int
    screening_pass_rate: float
    oldest_version: int
    mean_version: float
    """Over the tokens."""

    @property
    def pass_rate(self) -> float:
        return self.num_passed / self.num_completions


def weigh_group(message: GroupFinished | BatchGroup) -> GroupFacts:
    """The facts of a group, without making its completions. Raises ProtocolError as `unpack_group`
    does."""
    _check_group(message)
    passed = message.rewards >= PASS_REWARD
    num_screening = message.num_screening
    return GroupFacts(
        num_completions=len(passed),
        num_passed=int(np.count_nonzero(passed)),
        screening_pass_rate=int(np.count_nonzero(passed[:num_screening])) / max(num_screening, 1),
        oldest_version=int(message.policy_versions.min()),
        mean_version=float(message.policy_versions.mean()),
    )


def unpack_group(message: GroupFinished | BatchGroup) -> Group:
    """The group of a message; its arrays are views of the message's.

    Raises ProtocolError when the numbers contradict each other or cannot be what they claim.
    """
    _check_group(message)
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


def batch_group(message: GroupFinished) -> BatchGroup:
    """The same group on its way to the learner; nothing is copied."""
    return BatchGroup(
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


def _check_group(message: GroupFinished | BatchGroup) -> None:
    num_completions = len(message.lengths)
    num_tokens = len(message.token_ids)
    lengths, rewards, logprobs = message.lengths, message.rewards, message.logprobs
    truths = {
        "it has completions": num_completions >= 1,
        "it has tokens": num_tokens >= 1,
        "lease_id >= 0": message.lease_id >= 0,
        "prompt_id >= 0": message.prompt_id >= 0,
        "0 <= num_screening <= completions": 0 <= message.num_screening <= num_completions,
        "lengths >= 0": _within(lengths, 0),
        "lengths sum to the tokens": int(lengths.sum(dtype=np.int64)) == num_tokens,
        "one reward a completion": len(rewards) == num_completions,
        "one cut mark of 0 or 1 a completion": len(message.cut) == num_completions
        and _within(message.cut, 0, 1),
        "one logprob a token": len(logprobs) == num_tokens,
        "one policy version a token": len(message.policy_versions) == num_tokens,
        "rewards in [0, 1]": _within(rewards, 0.0, 1.0),
        "logprobs finite and <= 0": _within(logprobs, MIN_LOGPROB, MAX_LOGPROB),
        "policy versions >= 0": _within(message.policy_versions, 0),
        "token ids >= 0": _within(message.token_ids, 0) and _within(message.prompt_token_ids, 0),
    }
    broken = [truth for truth, holds in truths.items() if not holds]
    if broken:
        raise ProtocolError(f"group of lease {message.lease_id} breaks: {'; '.join(broken)}")


def _within(values: np.ndarray, low: float, high: float | None = None) -> bool:
    """Whether all lie in [low, high]. Extremes take no room, as comparing all values would. The
    extreme of values with a NaN among them is NaN, which is in no range."""
    if not values.size:
        return True
    return bool(low <= values.min()) and (high is None or bool(values.max() <= high))
