"""The manifest of one broadcast: names, shapes, dtypes and bucket size.

The manifest is sent as JSON before the weights, and is validated field by field. It determines the
bucket of every tensor (see `buckets.plan_buckets`), so the sender and the receivers derive the same
layout. The long list of tensors is sent once per epoch; later manifests refer to it by its digest.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.canary import MAX_CANARY_TOKENS, Canary
from speed_async.weight_sync.channel import NamedTensor

FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_NAMES_SHOWN = 5

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

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    policy_version: int
    bucket_bytes: int
    tensors: tuple[TensorSpec, ...]
    canary: Canary | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The list of tensors known to all members of an epoch, and the specs the receiver expected."""

    tensors: tuple[TensorSpec, ...]
    digest: str
    expected: tuple[TensorSpec, ...] = ()


def describe(tensors: Sequence[NamedTensor], cast: torch.dtype | None) -> tuple[TensorSpec, ...]:
    """Specs of the tensors as sent; `cast` replaces the dtype of floating-point tensors.

    Raises WeightSyncError for a duplicate name and for an unsupported dtype.
    """
    specs = tuple(
        TensorSpec(
            name=name,
            dtype=cast if cast is not None and tensor.is_floating_point() else tensor.dtype,
            shape=tuple(tensor.shape),
        )
        for name, tensor in tensors
    )
    _check_names(specs)
    for spec in specs:
        if spec.dtype not in DTYPES.values():
            raise WeightSyncError(f"tensor '{spec.name}' has dtype {spec.dtype}: cannot be sent")
    return specs


def matches(
    specs: Sequence[TensorSpec], tensors: Sequence[NamedTensor], cast: torch.dtype | None
) -> bool:
    """Whether `describe` would return these specs; much faster than calling it."""
    return len(specs) == len(tensors) and all(
        spec.name == name
        and spec.shape == tensor.shape
        and spec.dtype
        == (cast if cast is not None and tensor.is_floating_point() else tensor.dtype)
        for spec, (name, tensor) in zip(specs, tensors, strict=True)
    )


def digest_of(specs: Sequence[TensorSpec]) -> str:
    """SHA-256 of a list of tensors, in hexadecimal."""
    return hashlib.sha256(json.dumps(_rows(specs)).encode()).hexdigest()


def encode_manifest(manifest: Manifest, known: Agreement | None = None) -> bytes:
    """JSON bytes. The digest replaces the tensors when they are those of `known`.

    Raises WeightSyncError when the bytes exceed MAX_MANIFEST_BYTES.
    """
    digest = known.digest if known is not None and known.tensors == manifest.tensors else None
    payload = json.dumps(
        {
            "format": FORMAT_VERSION,
            "policy_version": manifest.policy_version,
            "bucket_bytes": manifest.bucket_bytes,
            "tensors": _rows(manifest.tensors) if digest is None else digest,
            "canary": _encode_canary(manifest.canary),
        }
    ).encode()
    if len(payload) > MAX_MANIFEST_BYTES:
        raise WeightSyncError(
            f"manifest of {len(manifest.tensors)} tensors takes {len(payload)} bytes,"
            f" more than {MAX_MANIFEST_BYTES}"
        )
    return payload


def decode_manifest(payload: bytes, known: Agreement | None = None) -> Manifest:
    """Inverse of `encode_manifest`. Raises WeightSyncError for anything malformed."""
    if len(payload) > MAX_MANIFEST_BYTES:
        raise WeightSyncError(f"manifest of {len(payload)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        match json.loads(payload):
            case {
                "format": 2,
                "policy_version": int(policy_version),
                "bucket_bytes": int(bucket_bytes),
                "tensors": list() | str() as tensors,
                "canary": canary_value,
            } if bucket_bytes > 0:
                specs = _decode_tensors(tensors, known)
                canary = _decode_canary(canary_value)
            case _:
                raise WeightSyncError(f"manifest is not of format {FORMAT_VERSION}")
    except (ValueError, RecursionError) as error:
        raise WeightSyncError(f"manifest is not JSON: {error}") from error
    return Manifest(
        policy_version=policy_version, bucket_bytes=bucket_bytes, tensors=specs, canary=canary
    )


def accept_manifest(
    payload: bytes,
    policy_version: int,
    expected: Sequence[NamedTensor],
    known: Agreement | None = None,
    *,
    is_unchanged: bool = False,
) -> Manifest:
    """The manifest, if it has the offered version and the expected tensors. Raises WeightSyncError.

    `is_unchanged` means that `expected` is the same as when the list of `known` was accepted.
    """
    manifest = decode_manifest(payload, known)
    if manifest.policy_version != policy_version:
        raise WeightSyncError(
            f"policy version {manifest.policy_version} was received, {policy_version} was offered"
        )
    if is_unchanged and known is not None and manifest.tensors is known.tensors:
        return manifest
    if differs := difference(manifest.tensors, expected):
        raise WeightSyncError(differs)
    return manifest


def difference(announced: Sequence[TensorSpec], expected: Sequence[NamedTensor]) -> str:
    """Description of the difference between announced and expected tensors; empty for none.

    The order is ignored, because tensors are loaded by name.
    """
    theirs = {spec.name: spec for spec in announced}
    ours = {spec.name: spec for spec in describe(expected, None)}
    differing = [
        f"{name} is {theirs[name]}, expected {spec}"
        for name, spec in ours.items()
        if name in theirs and theirs[name] != spec
    ]
    parts = {
        "missing": [name for name in ours if name not in theirs],
        "not expected": [name for name in theirs if name not in ours],
        "different": differing,
    }
    return "; ".join(f"{label}: {_shorten(names)}" for label, names in parts.items() if names)


def _rows(specs: Sequence[TensorSpec]) -> list[list[object]]:
    return [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs]


def _decode_tensors(tensors: list[object] | str, known: Agreement | None) -> tuple[TensorSpec, ...]:
    if isinstance(tensors, str):
        if known is None or tensors != known.digest:
            raise WeightSyncError(f"manifest refers to unknown tensors {tensors[:64]}")
        return known.tensors
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


def _encode_canary(canary: Canary | None) -> dict[str, object] | None:
    """JSON preserves floats bitwise, because they are written with all necessary digits."""
    if canary is None:
        return None
    return {"token_ids": list(canary.token_ids), "logprobs": list(canary.logprobs)}


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


def _check_names(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise WeightSyncError(f"tensor '{spec.name}' is announced twice")
        seen.add(spec.name)


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
