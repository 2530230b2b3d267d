"""Contiguous weights, whose memory has the layout of a bucket: they need no packing.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from speed_async.weight_sync.buckets import ALIGNMENT_BYTES, Bucket


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
    starts = _starts(parameters)
    flat_B = torch.empty(starts[-1], dtype=torch.uint8, device=filled[0].device)
    for parameter, start in zip(parameters, starts, strict=False):
        stop = start + parameter.numel() * parameter.itemsize
        target = flat_B[start:stop].view(parameter.dtype).view(parameter.shape)
        parameter.data = target.copy_(parameter.detach())
    return starts[-1]


def contiguous_view(bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bucket as a view, (B,) uint8, of the memory of its tensors.

    None unless all tensors are in one storage with the layout of the bucket: contiguous, in order,
    with the dtypes of the manifest and the offsets of the bucket. The view includes the gaps
    between tensors, each smaller than ALIGNMENT_BYTES.
    """
    first, base, storage_address = None, 0, 0
    for span in bucket.spans:
        spec = span.spec
        tensor = tensors[spec.name]
        address = tensor.data_ptr()
        if not address:  # a tensor without elements has no memory
            continue
        if first is None:
            first, base, storage_address = tensor, address - span.start, _address_of_storage(tensor)
        if (
            address != base + span.start
            or tensor.dtype != spec.dtype
            or not tensor.is_contiguous()
            or _address_of_storage(tensor) != storage_address
        ):
            return None
    if first is None or base < storage_address:
        return None
    view_B = torch.empty(0, dtype=torch.uint8, device=first.device)
    return view_B.set_(first.untyped_storage(), base - storage_address, (bucket.num_bytes,), (1,))


def _address_of_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Byte offset of each tensor, followed by the total size."""
    starts = [0]
    for tensor in tensors:
        stop = starts[-1] + tensor.numel() * tensor.itemsize
        starts.append(-(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return starts
