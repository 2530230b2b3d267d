"""Groups as messages: packing, unpacking and validation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_async.errors import ProtocolError
from speed_async.transport.codec import decode
from speed_async.transport.groups import (
    MAX_LOGPROB,
    GroupBounds,
    pack_group,
    unpack_group,
    validate_group,
)
from speed_async.types import ActorCounts, Completion, FinishReason, Group, Sampled
from tests.fakes.wire_samples import as_bytes, group_message


def sampled(token_ids, logprobs, versions, finish_reason: FinishReason = "stop") -> Sampled:
    return Sampled(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        policy_versions=np.array(versions, np.int32),
        finish_reason=finish_reason,
    )


def test_groups_round_trip():
    group = Group(
        lease_id=7,
        prompt_id=11,
        prompt_token_ids=np.array([1, 2, 3], np.int32),
        completions=(
            Completion(sampled=sampled([10, 11], [-0.5, -0.25], [4, 5]), reward=1.0, passed=True),
            Completion(sampled=sampled([], [], [], "abort"), reward=0.0, passed=False),
            Completion(sampled=sampled([12], [-2.0], [5], "length"), reward=-0.25, passed=True),
        ),
        num_screening=1,
    )
    counts = ActorCounts(tokens_generated=3)
    message = pack_group(group, counts)
    assert message.counts == counts
    assert message.lengths.tolist() == [2, 0, 1]
    assert message.token_ids.tolist() == [10, 11, 12]
    assert message.logprobs.tolist() == [-0.5, -0.25, -2.0]
    assert message.policy_versions.tolist() == [4, 5, 5]
    unpacked = unpack_group(decode(as_bytes(message)))  # type: ignore
    assert (unpacked.lease_id, unpacked.prompt_id, unpacked.num_screening) == (7, 11, 1)
    assert unpacked.prompt_token_ids.tolist() == [1, 2, 3]
    assert [one.reward for one in unpacked.completions] == [1.0, 0.0, -0.25]
    assert [one.passed for one in unpacked.completions] == [True, False, True]
    token_ids = [one.sampled.token_ids.tolist() for one in unpacked.completions]
    assert token_ids == [[10, 11], [], [12]]
    assert unpacked.completions[0].sampled.logprobs.tolist() == [-0.5, -0.25]
    assert unpacked.completions[2].sampled.policy_versions.tolist() == [5]
    assert unpacked.oldest_version == 4
    stats = validate_group(message)
    assert (stats.num_completions, stats.num_passed, stats.oldest_version) == (3, 2, 4)
    assert (stats.num_rewarded, stats.num_truncated, stats.num_truncated_passed) == (2, 1, 1)
    assert stats.pass_rate == unpacked.pass_rate == pytest.approx(2 / 3)
    assert stats.screening_pass_rate == 1.0
    assert stats.mean_version == pytest.approx(14 / 3)
    # Only truncation by a length limit is preserved of the finish reason.
    assert [one.sampled.finish_reason for one in unpacked.completions] == [
        "stop",
        "stop",
        "length",
    ]


INT, FLOAT = np.int32, np.float32


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lengths": np.array([2, 2], INT)}, "lengths to sum to the number"),
        ({"lengths": np.array([4, -1], INT)}, "lengths >= 0"),
        (
            {"lengths": np.array([2**31 - 1, 2**31 - 1], INT)},
            "lengths to sum to the number",
        ),
        ({"lengths": np.array([], INT)}, "at least one completion"),
        ({"rewards": np.array([1.0], FLOAT)}, "one reward per completion"),
        ({"rewards": np.array([1.0, 2e6], FLOAT)}, "rewards in"),
        ({"rewards": np.array([1.0, -np.inf], FLOAT)}, "rewards in"),
        ({"rewards": np.array([1.0, np.nan], FLOAT)}, "rewards in"),
        ({"passed": np.array([1], INT)}, "one passed value"),
        ({"passed": np.array([1, 2], INT)}, "one passed value"),
        ({"logprobs": np.array([-1.0, -1.0], FLOAT)}, "one logprob per token"),
        ({"logprobs": np.array([-1.0, -1.0, 0.001], FLOAT)}, "logprobs finite"),
        ({"logprobs": np.array([-1.0, -1.0, np.nan], FLOAT)}, "logprobs finite"),
        ({"logprobs": np.array([-1.0, -1.0, -np.inf], FLOAT)}, "logprobs finite"),
        ({"policy_versions": np.array([0, 1], INT)}, "one policy version per token"),
        ({"policy_versions": np.array([0, 1, -1], INT)}, "policy versions >= 0"),
        ({"token_ids": np.array([1, 2, -3], INT)}, "token ids >= 0"),
        ({"prompt_token_ids": np.array([-1], INT)}, "token ids >= 0"),
        ({"num_screening": 3}, "num_screening"),
        ({"num_screening": -1}, "num_screening"),
        ({"prompt_id": -1}, "prompt_id >= 0"),
    ],
)
def test_inconsistent_groups_are_rejected(changes, error):
    with pytest.raises(ProtocolError, match=f"lease 7 is invalid: .*{error}"):
        unpack_group(group_message(**changes))


def test_groups_without_tokens_are_rejected():
    empty = {name: np.array([], INT) for name in ("token_ids", "policy_versions")}
    message = group_message(**empty, logprobs=np.array([], FLOAT), lengths=np.array([0, 0], INT))
    with pytest.raises(ProtocolError, match="at least one token"):
        unpack_group(message)


def test_logprobs_bounds_the_rounding_tolerance_are_accepted():
    group = unpack_group(group_message(logprobs=np.array([-1.0, -1.0, 0.00005], FLOAT)))
    assert group.num_tokens == 3


@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32),
            st.floats(max_value=0.0, width=32),
            st.sampled_from([0.0, -0.0, 1e-4, MAX_LOGPROB, -3.4028234663852886e38]),
            st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_bitwise_logprob_check_matches_the_float_check(values):
    logprobs = np.array(values, FLOAT)
    is_valid = bool(np.all(np.isfinite(logprobs)) and np.all(logprobs <= np.float32(MAX_LOGPROB)))
    size = len(logprobs)
    message = group_message(
        token_ids=np.zeros(size, INT),
        policy_versions=np.zeros(size, INT),
        lengths=np.array([size, 0], INT),
        logprobs=logprobs,
    )
    if is_valid:
        assert validate_group(message).num_completions == 2
    else:
        with pytest.raises(ProtocolError, match="logprobs finite"):
            validate_group(message)


def test_bounds_limit_tokens_versions_and_lengths():
    message = group_message()
    largest, newest = int(message.token_ids.max()), int(message.policy_versions.max())
    bounds = GroupBounds(completion_tokens=3, largest_token_id=largest, newest_version=newest)
    assert validate_group(message, bounds).num_completions == len(message.lengths)
    for name, value, error in (
        ("largest_token_id", largest - 1, f"token {largest} is not in the vocabulary"),
        ("newest_version", newest - 1, "newer than the current version"),
        ("completion_tokens", int(message.lengths.max()) - 1, "longer than"),
    ):
        with pytest.raises(ProtocolError, match=error):
            validate_group(message, replace(bounds, **{name: value}))
