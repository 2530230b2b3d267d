"""Tensors flattened into contiguous byte buckets, and back.

Bytes, not numbers: mixed dtypes share a bucket, and what arrives is bitwise what left.

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
"""Buckets on their way at once: one is packed, or loaded, while another travels."""


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
    """Tensors that travel together; `spans` in ascending order, one at least."""

    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return self.spans[-1].stop


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


def pack(tensors: Mapping[str, Tensor], views: Sequence[NamedTensor]) -> None:
    """Copy a bucket's tensors into its views of a buffer, as `unpack` makes them.

    Conversion to the announced dtype and the move between devices happen in the copy.
    """
    targets = [view for _, view in views]
    sources = [tensors[name] for name, _ in views]
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        targets, sources, non_blocking=True
    )


def unpack(bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
    """Views into the buffer, named, with the announced shapes and dtypes."""
    return [(span.spec.name, _view(buffer_B, span)) for span in bucket.spans]


class BufferRing:
    """Reused buffers of equal size: one is filled while the others travel."""

    def __init__(self) -> None:
        self._buffers_B: list[Tensor] = []

    def reserve(self, buckets: Sequence[Bucket], device: torch.device, *, pinned: bool) -> None:
        """Make each buffer hold the largest bucket; what is large enough is kept."""
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
        """The whole buffer, at least (B,), whose turn it is."""
        return self._buffers_B[bucket_index % NUM_BUFFERS]

    def discard(self) -> None:
        """Let go of all: an aborted transfer may still write into them."""
        self._buffers_B = []


class Views:
    """Tensors in reused buffers: made once for each bucket, as long as the buffer stays."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Bucket, Tensor, list[NamedTensor]]] = {}

    def of(self, bucket_index: int, bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
        made = self._made.get(bucket_index)
        if made is None or made[0] is not bucket or made[1] is not buffer_B:
            made = bucket, buffer_B, unpack(bucket, buffer_B)
            self._made[bucket_index] = made
        return made[2]

    def discard(self) -> None:
        self._made = {}


def _view(buffer_B: Tensor, span: Span) -> Tensor:
    return buffer_B[span.start : span.stop].view(span.spec.dtype).view(span.spec.shape)
