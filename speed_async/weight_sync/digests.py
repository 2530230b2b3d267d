"""Digests of tensors: integers that show whether a receiver holds exactly what was sent.

The sender computes them from its parameters, in the dtypes in which they are sent, and a receiver
from the parameters that its model holds after loading. The canary verifies what an engine computes
with them. It does not see a difference below its tolerance, nor an expert that its tokens are not
routed to.

The digest is a multilinear hash (Lemire and Kaser, "Strongly universal string hashing is fast",
2014): the bytes as 32-bit words, times fixed odd 64-bit weights, summed modulo 2**64. It changes
with any single word, and two different tensors have equal digests with a probability of about
2**-32. Integer sums do not depend on their order, so a CPU and a GPU have the same result.

Shape legend: W words of one tensor, R rows, C = NUM_WEIGHTS columns, D digests.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.channel import NamedTensor

NUM_WEIGHTS = 32768
ROWS_AT_ONCE = {"cpu": 1, "cuda": 64}
"""Rows in one operation. A row of 256 KiB stays in the cache of a CPU; many rows fill a GPU."""
REMEDY = (
    "a tensor was changed in transfer or was not loaded; if a restarted actor fails again, set "
    "weights.backend = 'gloo' and test the memory of both machines"
)


@torch.no_grad()
def tensor_digests(tensors: Iterable[NamedTensor]) -> dict[str, int]:
    """The digest of every tensor by name, a signed 64-bit integer.

    It depends on the bytes in logical order, and not on strides or devices. Each tensor is only
    used before the next one is requested, so that a generator can convert one at a time.
    """
    digests: dict[str, Tensor] = {}
    buffers: dict[torch.device, Tensor] = {}
    for name, tensor in tensors:
        device = tensor.device
        if device not in buffers:
            shape = ROWS_AT_ONCE[device.type], NUM_WEIGHTS
            buffers[device] = torch.empty(shape, dtype=torch.int64, device=device)
        digests[name] = _digest(_words(tensor), _weights(device), buffers[device])
    if not digests:
        return {}
    first = next(iter(buffers))  # one copy from a GPU instead of D
    digests_D = torch.stack([digest.to(first) for digest in digests.values()])
    return dict(zip(digests, digests_D.tolist(), strict=True))


def verify_digests(
    sent: Mapping[str, int], loaded: Mapping[str, int], *, policy_version: int
) -> None:
    """Compares the digests of all tensors that a receiver has loaded with those of the sender.

    Raises WeightSyncError with the number of tensors that differ and the name of the first.
    """
    names = {**loaded, **sent}
    differing = [name for name in names if sent.get(name) != loaded.get(name)]
    if differing:
        raise WeightSyncError(
            f"policy version {policy_version} is refused, its digest failed: {len(differing)} of "
            f"{len(names)} tensors differ from the learner's, first '{differing[0]}'; {REMEDY}"
        )


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int32 (W,); as uint8 if their number is not a multiple of four."""
    flat = tensor.detach().reshape(-1)
    if flat.nbytes % 4:
        return flat.view(torch.uint8)
    if flat.storage_offset() * flat.itemsize % 4:
        flat = flat.clone()  # words must be aligned
    return flat.view(torch.int32)


def _digest(words_W: Tensor, weights_C: Tensor, buffer_RC: Tensor) -> Tensor:
    """The digest as an int64 scalar on the device of the words. That of more than one row is the
    digest of the sums of its rows."""
    num_words = len(words_W)
    if num_words <= NUM_WEIGHTS:
        return _weighted_sums(words_W[None], weights_C[:num_words], buffer_RC)[0]
    num_rows = num_words // NUM_WEIGHTS
    rows_RC = words_W[: num_rows * NUM_WEIGHTS].view(num_rows, NUM_WEIGHTS)
    sums = [_weighted_sums(rows, weights_C, buffer_RC) for rows in rows_RC.split(len(buffer_RC))]
    rest = _digest(words_W[num_rows * NUM_WEIGHTS :], weights_C, buffer_RC)
    return _digest(torch.cat([*sums, rest[None]]).view(torch.int32), weights_C, buffer_RC)


def _weighted_sums(rows_RC: Tensor, weights_C: Tensor, buffer_RC: Tensor) -> Tensor:
    """int64 (R,). The buffer has at least this size and is overwritten."""
    num_rows, num_columns = rows_RC.shape
    wide_RC = buffer_RC[:num_rows, :num_columns].copy_(rows_RC)
    if wide_RC.is_cpu:
        return wide_RC.mv(weights_C)  # faster; on a GPU, it is not implemented for integers
    return wide_RC.mul_(weights_C).sum(1)


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """Odd int64 (C,). NumPy keeps the stream of a bit generator in all releases."""
    odd = np.random.PCG64(0).random_raw(NUM_WEIGHTS) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64)).to(device)
