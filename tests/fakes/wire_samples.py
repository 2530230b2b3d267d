"""Sample messages for the transport tests."""

from dataclasses import replace

import numpy as np

from speed_async.transport.codec import encode
from speed_async.transport.messages import GroupFinished, Message
from speed_async.types import ActorCounts


def group_message(**changes: object) -> GroupFinished:
    """Two completions of 2 and 1 tokens for a prompt of 3 tokens."""
    message = GroupFinished(
        counts=ActorCounts(groups_leased=1, tokens_generated=3),
        lease_id=7,
        prompt_id=11,
        num_screening=1,
        prompt_token_ids=np.array([1, 2, 3], np.int32),
        lengths=np.array([2, 1], np.int32),
        rewards=np.array([1.0, 0.0], np.float32),
        passed=np.array([1, 0], np.int32),
        cut=np.array([1, 0], np.int32),
        token_ids=np.array([10, 11, 12], np.int32),
        logprobs=np.array([-0.5, -0.25, -2.0], np.float32),
        policy_versions=np.array([4, 5, 5], np.int32),
    )
    return replace(message, **changes)


def as_bytes(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in encode(message)]
