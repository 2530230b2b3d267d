"""The manifest of one broadcast: names, shapes, dtypes and digests of tensors, and bucket size.

The manifest is sent as JSON before the weights, and is validated field by field. It determines the
bucket of every tensor (see `buckets.plan_buckets`), so the sender and the receivers derive the same
layout. The long list of tensors is sent once per epoch; later manifests refer to it by its digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.canary_check import MAX_CANARY_TOKENS, Canary
from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.float_dtypes import FloatDtypes

FORMAT_VERSION = 4
MAX_MANIFEST_BYTES = 8 * 1024 * 1024
"""The largest value that torch's TCPStore accepts."""
MAX_NAMES_SHOWN = 5
MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1
UNCHANGED = FloatDtypes()

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def fits(self, tensor: Tensor, cast: FloatDtypes = UNCHANGED) -> bool:
        """Whether the tensor, after a cast of floating-point values, has this shape and dtype."""
        return self.shape == tensor.shape and self.dtype == cast.of(self.name, tensor)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    policy_version: int
    bucket_bytes: int
    tensors: tuple[TensorSpec, ...]
    canary: Canary | None = None
    digests: Mapping[str, int] = field(default_factory=dict)
    """Of every tensor, see `digests.tensor_digests`; or empty."""
    memory: object = None
    """JSON value that describes the sender's shared memory; validated by `ipc.open_memory`."""


class KnownTensors:
    """A list of tensors that all members of an epoch know, with its SHA-256 digest."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = specs
        self.digest = hashlib.sha256(json.dumps(_rows(specs)).encode()).hexdigest()


def describe(
    tensors: Sequence[NamedTensor], cast: FloatDtypes = UNCHANGED
) -> tuple[TensorSpec, ...]:
    """Specs of the tensors as sent; `cast` replaces the dtype of floating-point tensors.

    Raises WeightSyncError for a duplicate name and for an unsupported dtype.
    """
    specs = tuple(
        TensorSpec(name=name, dtype=cast.of(name, tensor), shape=tuple(tensor.shape))
        for name, tensor in tensors
    )
    _check_names(specs)
    for spec in specs:
        if spec.dtype not in DTYPES.values():
            raise WeightSyncError(f"tensor '{spec.name}' has dtype {spec.dtype}: cannot be sent")
    return specs


def matches(specs: Sequence[TensorSpec], tensors: Sequence[NamedTensor], cast: FloatDtypes) -> bool:
    """Whether `describe` would return these specs; much faster than calling it."""
    return len(specs) == len(tensors) and all(
        spec.name == name and spec.fits(tensor, cast)
        for spec, (name, tensor) in zip(specs, tensors, strict=True)
    )


def encode_manifest(manifest: Manifest, known: KnownTensors | None = None) -> bytes:
    """JSON bytes. The digest replaces the tensors when they are those of `known`.

    Raises WeightSyncError when the bytes exceed MAX_MANIFEST_BYTES.
    """
    digest = known.digest if known is not None and known.specs == manifest.tensors else None
    canary = manifest.canary
    payload = json.dumps(
        {
            "format": FORMAT_VERSION,
            "policy_version": manifest.policy_version,
            "bucket_bytes": manifest.bucket_bytes,
            "tensors": digest or _rows(manifest.tensors),
            # JSON preserves floats bitwise, because they are written with all necessary digits.
            "canary": canary and {"token_ids": canary.token_ids, "logprobs": canary.logprobs},
            "digests": [
                manifest.digests[spec.name] for spec in manifest.tensors if manifest.digests
            ],
            "memory": manifest.memory,
        }
    ).encode()
    if len(payload) > MAX_MANIFEST_BYTES:
        raise WeightSyncError(
            f"manifest of {len(manifest.tensors)} tensors takes {len(payload)} bytes,"
            f" more than {MAX_MANIFEST_BYTES}"
        )
    return payload


def decode_manifest(payload: bytes, known: KnownTensors | None = None) -> Manifest:
    """Inverse of `encode_manifest`. Raises WeightSyncError for anything malformed."""
    if len(payload) > MAX_MANIFEST_BYTES:
        raise WeightSyncError(f"manifest of {len(payload)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        match json.loads(payload):
            case {
                "format": 4,
                "policy_version": int(policy_version),
                "bucket_bytes": int(bucket_bytes),
                "tensors": list() | str() as tensors,
                "canary": canary,
                "digests": list() as digests,
                "memory": memory,
            } if bucket_bytes > 0:
                specs = _decode_tensors(tensors, known)
                return Manifest(
                    policy_version=policy_version,
                    bucket_bytes=bucket_bytes,
                    tensors=specs,
                    canary=_decode_canary(canary),
                    digests=_decode_digests(digests, specs),
                    memory=memory,
                )
            case _:
                raise WeightSyncError(f"manifest is not of format {FORMAT_VERSION}")
    except (ValueError, RecursionError) as error:
        raise WeightSyncError(f"manifest is not JSON: {error}") from error


def accept_manifest(
    payload: bytes,
    policy_version: int,
    expected: Sequence[NamedTensor],
    known: KnownTensors | None = None,
) -> Manifest:
    """The manifest, if it has the offered version and the expected tensors, in any order, because
    tensors are loaded by name. Raises WeightSyncError that names the difference."""
    manifest = decode_manifest(payload, known)
    if manifest.policy_version != policy_version:
        raise WeightSyncError(
            f"policy version {manifest.policy_version} was received, {policy_version} was offered"
        )
    theirs, ours = {spec.name: spec for spec in manifest.tensors}, dict(expected)
    differing = [name for name in ours if name in theirs and not theirs[name].fits(ours[name])]
    parts = {
        "missing": [name for name in ours if name not in theirs],
        "not expected": [name for name in theirs if name not in ours],
        "different": [
            f"{spec.name} is {theirs[spec.name]}, expected {spec}"
            for spec in describe([(name, ours[name]) for name in differing])
        ],
    }
    if any(parts.values()):
        raise WeightSyncError(
            "; ".join(f"{label}: {_shorten(names)}" for label, names in parts.items() if names)
        )
    return manifest


def _rows(specs: Sequence[TensorSpec]) -> list[list[object]]:
    return [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs]


def _decode_tensors(
    tensors: list[object] | str, known: KnownTensors | None
) -> tuple[TensorSpec, ...]:
    if isinstance(tensors, str):
        if known is None or tensors != known.digest:
            raise WeightSyncError(f"manifest refers to unknown tensors {tensors[:64]}")
        return known.specs
    specs = tuple(_decode_spec(row) for row in tensors)
    _check_names(specs)
    return specs


def _decode_spec(row: object) -> TensorSpec:
    match row:
        case [str(name), str(dtype), list(shape)] if dtype in DTYPES and all(
            type(extent) is int and extent >= 0 for extent in shape
        ):
            return TensorSpec(name=name, dtype=DTYPES[dtype], shape=tuple(shape))
        case _:
            raise WeightSyncError(f"manifest has a malformed entry: {str(row)[:200]}")


def _decode_canary(value: object) -> Canary | None:
    match value:
        case None:
            return None
        case {"token_ids": list(token_ids), "logprobs": list(logprobs)} if (
            len(token_ids) <= MAX_CANARY_TOKENS
        ):
            return Canary(token_ids=tuple(token_ids), logprobs=tuple(logprobs))
        case _:
            raise WeightSyncError(f"manifest has a malformed canary: {str(value)[:200]}")


def _decode_digests(values: list[object], specs: Sequence[TensorSpec]) -> dict[str, int]:
    digests = [value for value in values if type(value) is int and MIN_INT64 <= value <= MAX_INT64]
    if len(digests) < len(values) or len(values) not in (0, len(specs)):
        raise WeightSyncError(
            f"manifest of {len(specs)} tensors has malformed digests: {str(values)[:200]}"
        )
    return {spec.name: digest for spec, digest in zip(specs, digests, strict=False)}


def _check_names(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise WeightSyncError(f"tensor '{spec.name}' is announced twice")
        seen.add(spec.name)


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
