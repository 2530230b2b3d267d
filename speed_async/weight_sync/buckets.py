"""Packing of tensors into contiguous byte buckets, and unpacking.

Buckets are bytes, so that a bucket can contain several dtypes and transfers are bitwise exact.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.manifest import TensorSpec

ALIGNMENT_BYTES = 16
"""Every tensor starts at a multiple of this, so that its bytes can be viewed as its dtype."""
NUM_BUFFERS = 2
"""Buckets in flight at once: one is packed or loaded while another is transferred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Byte range of one tensor in its bucket."""

    spec: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.spec.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that are transferred together; `spans` are in ascending order and not empty."""

    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return self.spans[-1].stop


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fills buckets of at most `bucket_bytes`, in order. A larger tensor has its own bucket."""
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


def pack(tensors: Mapping[str, Tensor], views: Sequence[NamedTensor]) -> None:
    """Copies a bucket's tensors into its views of a buffer, as returned by `unpack`.

    The copy also converts to the dtype of the manifest and moves between devices.
    """
    targets = [view for _, view in views]
    sources = [tensors[name] for name, _ in views]
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        targets, sources, non_blocking=True
    )


def unpack(bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
    """Named views of the buffer, with the shapes and dtypes of the manifest."""
    return [(span.spec.name, _view(buffer_B, span)) for span in bucket.spans]


class BufferRing:
    """Reused buffers of equal size: one is filled while the others are transferred."""

    def __init__(self) -> None:
        self._buffers_B: list[Tensor] = []

    def reserve(self, buckets: Sequence[Bucket], device: torch.device, *, pinned: bool) -> None:
        """Allocates buffers that fit the largest bucket; keeps them if they are large enough."""
        num_bytes = max((bucket.num_bytes for bucket in buckets), default=0)
        kept = self._buffers_B
        if kept and kept[0].numel() >= num_bytes and kept[0].device.type == device.type:
            return
        self._buffers_B = []
        self._buffers_B = [
            torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
            for _ in range(NUM_BUFFERS)
        ]

    def get(self, bucket_index: int) -> Tensor:
        """The complete buffer of this bucket, at least (B,)."""
        return self._buffers_B[bucket_index % NUM_BUFFERS]

    def discard(self) -> None:
        """Drops all buffers: an aborted transfer may still write into them."""
        self._buffers_B = []


class Views:
    """Cache of the views of reused buffers, created once per bucket and buffer."""

    def __init__(self) -> None:
        self._cache: dict[int, tuple[Bucket, Tensor, list[NamedTensor]]] = {}

    def of(self, bucket_index: int, bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
        entry = self._cache.get(bucket_index)
        if entry is None or entry[0] is not bucket or entry[1] is not buffer_B:
            entry = bucket, buffer_B, unpack(bucket, buffer_B)
            self._cache[bucket_index] = entry
        return entry[2]

    def discard(self) -> None:
        self._cache = {}


def _view(buffer_B: Tensor, span: Span) -> Tensor:
    return buffer_B[span.start : span.stop].view(span.spec.dtype).view(span.spec.shape)
