"""Buckets: the tensors that are transferred together, and their layout as bytes.

A bucket may contain several dtypes, and transfers are bitwise exact. Contiguous weights, whose
memory has the layout of a bucket, need no packing.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed_async.weight_sync.channel import NamedTensor, TransferReport
from speed_async.weight_sync.manifest import Manifest, TensorSpec

ALIGNMENT_BYTES = 16
"""Every tensor starts at a multiple of this, so that its bytes can be viewed as its dtype."""
NUM_BUFFERS = 2
"""Buckets in flight at once: one is packed or loaded while another is transferred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """Byte range of one tensor in its bucket."""

    spec: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.spec.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that are transferred together, in ascending order; not empty."""

    tensors: tuple[PackedTensor, ...]

    @property
    def num_bytes(self) -> int:
        return self.tensors[-1].stop

    @property
    def names(self) -> list[str]:
        return [tensor.spec.name for tensor in self.tensors]


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fills buckets of at most `bucket_bytes`, in order. A larger tensor has its own bucket."""
    buckets: list[Bucket] = []
    packed: list[PackedTensor] = []
    for spec in specs:
        start = _align(packed[-1].stop) if packed else 0
        if packed and start + spec.num_bytes > bucket_bytes:
            buckets.append(Bucket(tensors=tuple(packed)))
            packed, start = [], 0
        packed.append(PackedTensor(spec=spec, start=start))
    if packed:
        buckets.append(Bucket(tensors=tuple(packed)))
    return tuple(buckets)


def largest_bytes(buckets: Sequence[Bucket]) -> int:
    return max((bucket.num_bytes for bucket in buckets), default=0)


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
    return [
        (
            packed.spec.name,
            buffer_B[packed.start : packed.stop].view(packed.spec.dtype).view(packed.spec.shape),
        )
        for packed in bucket.tensors
    ]


class Views:
    """Results of `unpack`, which are kept while the bucket and its buffer stay the same: with 300
    tensors, a call takes as long as their transfer."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Bucket, Tensor, list[NamedTensor]]] = {}

    def of(self, index: int, bucket: Bucket, buffer_B: Tensor) -> list[NamedTensor]:
        kept = self._kept.get(index)
        if kept is None or kept[0] is not bucket or kept[1] is not buffer_B:
            kept = self._kept[index] = bucket, buffer_B, unpack(bucket, buffer_B)
        return kept[2]


def flatten_parameters(model: nn.Module) -> int:
    """Moves the model's parameters into one storage, in the order of `named_parameters`.

    Values, names, ties and the Parameter objects are unchanged, so that existing optimisers keep
    working. Two copies of the weights exist temporarily. Returns the size of the storage in bytes.
    Returns 0 and moves nothing for a model on several devices, and for a model whose parameters
    already share storages.
    """
    parameters = list(model.parameters())
    filled = [parameter for parameter in parameters if parameter.numel()]
    storages = {parameter.untyped_storage().data_ptr() for parameter in filled}
    if len({parameter.device for parameter in filled}) != 1 or len(storages) < len(filled):
        return 0
    num_bytes = sum(_align(parameter.nbytes) for parameter in parameters)
    flat_B = torch.empty(num_bytes, dtype=torch.uint8, device=filled[0].device)
    start = 0
    for parameter in parameters:
        stop = start + parameter.nbytes
        target = flat_B[start:stop].view(parameter.dtype).view(parameter.shape)
        parameter.data = target.copy_(parameter.detach())
        start = _align(stop)
    return num_bytes


def contiguous_view(bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bucket as a view, (B,) uint8, of the memory of its tensors.

    None unless all tensors are in one storage with the layout of the bucket: contiguous, in order,
    with the dtypes of the manifest and the offsets of the bucket. The view includes the gaps
    between tensors, each smaller than ALIGNMENT_BYTES.
    """
    first, base, storage_address = None, 0, 0
    for packed in bucket.tensors:
        tensor = tensors.get(packed.spec.name)
        if tensor is None:
            return None
        address = tensor.data_ptr()
        if not address:  # a tensor without elements has no memory
            continue
        address_of_storage = tensor.untyped_storage().data_ptr()
        if first is None:
            first, base, storage_address = tensor, address - packed.start, address_of_storage
        if (
            address != base + packed.start
            or tensor.dtype != packed.spec.dtype
            or not tensor.is_contiguous()
            or address_of_storage != storage_address
        ):
            return None
    if first is None or base < storage_address:
        return None
    view_B = torch.empty(0, dtype=torch.uint8, device=first.device)
    return view_B.set_(first.untyped_storage(), base - storage_address, (bucket.num_bytes,), (1,))


def transfer_report(
    buckets: Sequence[Bucket], transfer_s: float, manifest: Manifest | None = None
) -> TransferReport:
    """`manifest`: only for receivers, which verify its canary and digests."""
    return TransferReport(
        num_bytes=sum(bucket.num_bytes for bucket in buckets),
        num_buckets=len(buckets),
        transfer_s=transfer_s,
        canary=manifest.canary if manifest is not None else None,
        digests=manifest.digests if manifest is not None else {},
    )


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
