"""The canary: verification against hand-computed values, token selection and encoding."""

import json
import math
from itertools import pairwise

import pytest

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.canary_check import (
    CANARY_TOKENS,
    MAX_CANARY_TOKENS,
    Canary,
    canary_token_ids,
    canary_tolerance,
    verify,
)
from speed_async.weight_sync.manifest import Manifest, decode_manifest, encode_manifest

CANARY = Canary(token_ids=(3, 1, 2, 0, 3), logprobs=(-1.0, -2.0, -3.0, -4.0))


# --- verification -------------------------------------------------------------------------------


def test_the_mean_difference_is_compared_and_returned() -> None:
    measured = (-1.0, -2.5, -2.75, -4.25)  # off by 0, 0.5, 0.25 and 0.25
    assert verify(CANARY, measured, tolerance=0.25, policy_version=7) == 0.25
    with pytest.raises(WeightSyncError) as caught:
        verify(CANARY, measured, tolerance=0.24, policy_version=7)
    text = str(caught.value)
    assert "policy version 7 is refused, its canary failed" in text
    assert "by 0.25 nats a token (largest 0.5), more than the tolerance of 0.24" in text
    assert "tied or packed copy" in text and "weights.canary_tolerance" in text
    assert "\n" not in text


def test_differences_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(WeightSyncError, match="by 1 nats a token"):
        verify(CANARY, (-2.0, -1.0, -4.0, -3.0), tolerance=0.5, policy_version=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_fails_at_any_tolerance(value: float) -> None:
    with pytest.raises(WeightSyncError, match=r"version 3 is refused.* 1 of 4 .* not finite"):
        verify(CANARY, (-1.0, value, -3.0, -4.0), tolerance=1e9, policy_version=3)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_measured_values_fails(count: int) -> None:
    with pytest.raises(WeightSyncError, match=f"{count} log-probabilities .* canary of 4"):
        verify(CANARY, [-1.0] * count, tolerance=1e9, policy_version=3)


@pytest.mark.parametrize(
    ("configured", "dtype", "expected"),
    [
        (None, "float32", 1e-3),
        (None, "torch.float32", 1e-3),
        (None, "float64", 1e-3),
        (None, "torch.bfloat16", 0.3),
        (None, "float16", 0.3),
        (0.5, "torch.float32", 0.5),
        (1e-12, "torch.bfloat16", 1e-12),
    ],
)
def test_the_tolerance_depends_on_the_dtype_unless_configured(
    configured: float | None, dtype: str, expected: float
) -> None:
    assert canary_tolerance(configured, dtype) == expected


# --- token selection ----------------------------------------------------------------------------


def test_the_tokens_are_deterministic_and_cover_the_vocabulary() -> None:
    token_ids = canary_token_ids(151_936, context_length=4096, seed=5)
    assert token_ids == canary_token_ids(151_936, context_length=4096, seed=5)
    assert token_ids != canary_token_ids(151_936, context_length=4096, seed=6)
    assert len(token_ids) == CANARY_TOKENS
    ordered = sorted(token_ids)
    assert [token_id * CANARY_TOKENS // 151_936 for token_id in ordered] == list(range(32))
    assert list(token_ids) != ordered
    assert max(b - a for a, b in pairwise(ordered)) <= 2 * 151_936 / 32


def test_the_tokens_fit_a_small_vocabulary_and_a_short_context() -> None:
    token_ids = canary_token_ids(11, context_length=20)
    assert len(token_ids) == 20 and set(token_ids) == set(range(11))
    assert len(canary_token_ids(11, context_length=64)) == CANARY_TOKENS


# --- encoding -----------------------------------------------------------------------------------


def manifest_with(canary: object) -> bytes:
    plain = {"format": 4, "policy_version": 1, "bucket_bytes": 1, "memory": None}
    plain |= {"tensors": [], "digests": []}
    return json.dumps(plain | {"canary": canary}).encode()


def test_a_manifest_preserves_the_canary_bitwise() -> None:
    logprobs = (-1 / 3, -0.0, -5e-324, -1.7976931348623157e308)
    canary = Canary(token_ids=(0, 2**40, 5, 5, 6), logprobs=logprobs)
    manifest = Manifest(policy_version=9, bucket_bytes=64, tensors=(), canary=canary)
    decoded = decode_manifest(encode_manifest(manifest))
    assert decoded == manifest
    assert decoded.canary is not None
    assert [value.hex() for value in decoded.canary.logprobs] == [value.hex() for value in logprobs]


@pytest.mark.parametrize(
    ("canary", "message"),
    [
        ([], "malformed canary"),
        ({"token_ids": [1, 2]}, "malformed canary"),
        ({"token_ids": "12", "logprobs": [-1.0]}, "malformed canary"),
        ({"token_ids": [1, -2], "logprobs": [-1.0]}, "token id -2"),
        ({"token_ids": [1, True], "logprobs": [-1.0]}, "token id True"),
        ({"token_ids": [1, 2.0], "logprobs": [-1.0]}, r"token id 2\.0"),
        ({"token_ids": [1, None], "logprobs": [-1.0]}, "token id None"),
        ({"token_ids": [1, 2], "logprobs": [-1]}, "log-probability -1"),
        ({"token_ids": [1, 2], "logprobs": ["-1.0"]}, "log-probability -1.0"),
        ({"token_ids": [1, 2], "logprobs": [math.nan]}, "log-probability nan"),
        ({"token_ids": [1, 2], "logprobs": [-math.inf]}, "log-probability -inf"),
        ({"token_ids": [1, 2], "logprobs": [-1.0, -1.0]}, "2 tokens with 2 log-prob"),
        ({"token_ids": [1, 2], "logprobs": []}, "2 tokens with 0 log-prob"),
        ({"token_ids": [1], "logprobs": []}, "canary of 1 tokens"),
        ({"token_ids": [], "logprobs": []}, "canary of 0 tokens"),
        ({"token_ids": [0] * 4097, "logprobs": [-1.0] * 4096}, "malformed canary"),
    ],
)
def test_a_malformed_canary_is_rejected(canary: object, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        decode_manifest(manifest_with(canary))


def test_the_canary_length_is_bounded() -> None:
    length = MAX_CANARY_TOKENS
    longest = {"token_ids": [0] * length, "logprobs": [-1.0] * (length - 1)}
    accepted = decode_manifest(manifest_with(longest)).canary
    assert accepted is not None and len(accepted.token_ids) == length
    with pytest.raises(WeightSyncError, match="canary of 4097 tokens"):
        Canary(token_ids=(0,) * (length + 1), logprobs=(-1.0,) * length)
