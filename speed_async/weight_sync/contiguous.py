"""Weights that lie in memory as they travel: sent, and received, without a copy.

Shape legend: B bytes of one bucket.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from speed_async.weight_sync.buckets import ALIGNMENT_BYTES, Bucket


def flatten_parameters(model: nn.Module) -> int:
    """Move the model's parameters into one storage, in the order of `named_parameters`.

    Values, names and ties stay as they are, and so do the Parameter objects: optimisers made
    before keep working. For a while both copies of the weights exist. Returns the bytes of the
    storage; 0 when nothing was moved, which is so for a model on several devices, and for one
    whose parameters share storages already.
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
        place = flat_B[start:stop].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
    return starts[-1]


def contiguous_view(bucket: Bucket, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bucket as a view, (B,) uint8, of the memory that its tensors lie in.

    None unless all lie in one storage just as they travel: in order, contiguous, in the announced
    dtypes, at the bucket's distances. The gaps between them (each under ALIGNMENT_BYTES) are part
    of the view.
    """
    first, base, home = None, 0, 0
    for span in bucket.spans:
        spec = span.spec
        tensor = tensors[spec.name]
        address = tensor.data_ptr()
        if not address:  # a tensor without elements lies nowhere
            continue
        if first is None:
            first, base, home = tensor, address - span.start, _address_of_storage(tensor)
        if (
            address != base + span.start
            or tensor.dtype != spec.dtype
            or not tensor.is_contiguous()
            or _address_of_storage(tensor) != home
        ):
            return None
    if first is None or base < home:
        return None
    view_B = torch.empty(0, dtype=torch.uint8, device=first.device)
    return view_B.set_(first.untyped_storage(), base - home, (bucket.num_bytes,), (1,))


def _address_of_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor starts, in bytes, and at last where all end."""
    starts = [0]
    for tensor in tensors:
        stop = starts[-1] + tensor.numel() * tensor.itemsize
        starts.append(-(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return starts
