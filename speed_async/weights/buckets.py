"""Tensors flattened into contiguous byte buckets, and back.

Bytes, not numbers: mixed dtypes share a bucket, and what arrives is bitwise what left.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_async.weights.channel import NamedTensor
from speed_async.weights.manifest import TensorSpec

ALIGNMENT_BYTES = 16
"""Every tensor starts at a multiple of this, so that its bytes can be viewed as its dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where one tensor lies in its bucket."""

    spec: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.spec.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return max(span.stop for span in self.spans)


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fill buckets of at most `bucket_bytes` in order; a larger tensor has a bucket alone."""
    buckets: list[Bucket] = []
    spans: list[Span] = []
    stop = 0
    for spec in specs:
        start = -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if spans and start + spec.num_bytes > bucket_bytes:
            buckets.append(Bucket(spans=tuple(spans)))
            spans, start = [], 0
        spans.append(Span(spec=spec, start=start))
        stop = spans[-1].stop
    if spans:
        buckets.append(Bucket(spans=tuple(spans)))
    return tuple(buckets)


def pack(bucket: Bucket, tensors: Mapping[str, Tensor], buffer_B: Tensor) -> Tensor:
    """Bytes of one bucket, (B,) uint8, on the device of `buffer_B`.

    A lone tensor that is laid out as it travels is returned as a view of itself, not copied.
    Conversion to the announced dtype and the move between devices happen in the copy.
    """
    first = bucket.spans[0]
    tensor = tensors[first.spec.name]
    if (
        len(bucket.spans) == 1
        and tensor.is_contiguous()
        and tensor.dtype == first.spec.dtype
        and tensor.device == buffer_B.device
    ):
        return tensor.reshape(-1).view(torch.uint8)
    for span in bucket.spans:
        source = tensors[span.spec.name]
        _view(buffer_B, span).copy_(source, non_blocking=True)
    return buffer_B[: bucket.num_bytes]


def unpack(bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
    """Views into the buffer, named, with the announced shapes and dtypes."""
    return [(span.spec.name, _view(buffer_B, span)) for span in bucket.spans]


class BufferPair:
    """Two reused buffers: one is filled while the other travels."""

    def __init__(self) -> None:
        self._buffers_B: list[Tensor] = []

    def reserve(self, buckets: Sequence[Bucket], device: torch.device, *, pinned: bool) -> None:
        """Make both buffers hold the largest bucket; what is large enough is kept."""
        num_bytes = max((bucket.num_bytes for bucket in buckets), default=0)
        kept = self._buffers_B
        if kept and kept[0].numel() >= num_bytes and kept[0].device.type == device.type:
            return
        self._buffers_B = []
        self._buffers_B = [
            torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
            for _ in range(2)
        ]

    def get(self, bucket_index: int) -> Tensor:
        """The whole buffer, at least (B,), whose turn it is."""
        return self._buffers_B[bucket_index % 2]

    def discard(self) -> None:
        """Let go of both: an aborted transfer may still write into them."""
        self._buffers_B = []


def _view(buffer_B: Tensor, span: Span) -> Tensor:
    return buffer_B[span.start : span.stop].view(span.spec.dtype).view(span.spec.shape)
