"""Memory shared by all ranks of one machine, for the ipc backend.

In host memory, the buffers are one anonymous memory file (memfd_create(2)), which its owner seals
against shrinking. On a GPU, they are allocations opened through CUDA IPC handles, which are sent as
JSON. The memory is freed when no process has it open, so killed processes leave nothing behind.

Shape legend: B bytes of one bucket.
"""

import base64
import contextlib
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.buckets import NUM_BUFFERS
from speed_async.weight_sync.device import gpu_uuid


def make_memory(num_bytes: int) -> int:
    """Descriptor of a sealed memory file of this size. Raises RuntimeError when memory is
    insufficient."""
    descriptor = os.memfd_create("speed-async-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(descriptor)
        raise RuntimeError(
            f"cannot allocate {num_bytes} bytes of shared memory: {error}"
        ) from error
    return descriptor


def open_memory(memory: object, descriptors: Sequence[int], device: torch.device) -> list[Tensor]:
    """The sender's buffers, (B,) uint8 each. Closes `descriptors`; raises WeightSyncError."""
    try:
        match memory:
            case {"device": "cpu", "num_bytes": int(num_bytes)} if descriptors:
                if not 0 < num_bytes * NUM_BUFFERS <= os.fstat(descriptors[0]).st_size:
                    raise WeightSyncError("the memory is smaller than its description")
                if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise WeightSyncError(
                        "the memory is not sealed: it could shrink while it is read"
                    )
                return map_memory(descriptors[0], num_bytes)
            case {"device": "cuda", "gpu": str(gpu), "buffers": list(buffers)} if (
                len(buffers) == NUM_BUFFERS
            ):
                return _open_on_gpu(gpu, buffers, device)
            case _:
                raise WeightSyncError("the description of the memory is malformed")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise WeightSyncError(f"the memory cannot be opened: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def map_memory(descriptor: int, num_bytes: int) -> list[Tensor]:
    mapped = mmap.mmap(descriptor, num_bytes * NUM_BUFFERS)
    with contextlib.suppress(OSError):  # a kernel without huge pages for memory files
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory_B = torch.frombuffer(mapped, dtype=torch.uint8)
    return list(memory_B.split(num_bytes))


def describe_on_gpu(buffers_B: Sequence[Tensor]) -> dict[str, object]:
    """CUDA IPC handles, with bytes as base64. torch's own sharing would pickle the same fields."""
    torch.cuda.synchronize(buffers_B[0].device)  # earlier kernels may still use this memory
    fields = [buffer_B.untyped_storage()._share_cuda_() for buffer_B in buffers_B]
    return {
        "device": "cuda",
        "gpu": gpu_uuid(buffers_B[0].device),
        "buffers": [[_to_plain(value) for value in each] for each in fields],
    }


def _open_on_gpu(gpu: str, buffers: list[Any], device: torch.device) -> list[Tensor]:
    if device.type != "cuda":
        raise WeightSyncError(
            f"the learner's weights are on a GPU and this actor is on '{device}': set"
            " actors.device = 'cuda', or weights.backend = 'gloo'"
        )
    visible = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    ours = [each for each in visible if gpu_uuid(each) == gpu]
    if not ours:
        raise WeightSyncError(
            f"the learner's GPU ({gpu}) is not visible here: give all ranks the same"
            " CUDA_VISIBLE_DEVICES, or set weights.backend = 'nccl' or 'gloo'"
        )
    torch.cuda.init()
    opened: list[Tensor] = []
    for fields in buffers:
        _, *rest = (_from_plain(value) for value in fields)
        storage = torch.UntypedStorage._new_shared_cuda(ours[0].index, *rest)
        buffer_B = torch.empty(0, dtype=torch.uint8, device=ours[0])
        opened.append(buffer_B.set_(storage, 0, (storage.nbytes(),), (1,)))
    return opened


def _to_plain(value: object) -> object:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_plain(value: object) -> object:
    match value:
        case {"base64": str(text)}:
            return base64.b64decode(text, validate=True)
        case bool() | int():
            return value
        case _:
            raise ValueError(f"a field of a memory handle is {str(value)[:40]}")
