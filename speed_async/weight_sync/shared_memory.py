"""Buffers shared by all ranks of one machine, and transfers through them.

In host memory, the buffers are one anonymous memory file (memfd_create(2)), which its owner seals
against shrinking and sends to the receivers over their sockets. On a GPU, they are allocations
opened through CUDA IPC handles, which are sent as JSON. The sender packs directly into the buffers
and receivers load directly from them. The memory is freed when no process has it open, so killed
processes leave nothing behind.

A buffer is reused after every receiver has acknowledged its content. Streams are synchronised on
the host before either side sends a frame, so no CUDA events are needed.

Shape legend: B bytes of one bucket.
"""

import base64
import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speed_async.weight_sync.backends import bucket_stage
from speed_async.weight_sync.buckets import NUM_BUFFERS, Bucket
from speed_async.weight_sync.epoch_group import EpochGroup
from speed_async.weight_sync.ipc_group import Kind


class SharedOutgoing:
    """Packs into shared buffers; satisfies `Outgoing`."""

    accepts_views = False

    def __init__(self, group: EpochGroup, buckets: Sequence[Bucket], device: torch.device) -> None:
        """Raises StageFailed when there is no memory for the buffers."""
        self._group, self._buckets = group, buckets
        self._ipc = group.ipc
        self._deadline_s = group.offer.deadline_s
        num_bytes = max((bucket.num_bytes for bucket in buckets), default=0)
        group.attempt("shared memory", lambda: self._reserve(max(num_bytes, 1), device))

    def acquire(self, index: int) -> Tensor:
        slot = index % NUM_BUFFERS
        num_taken = self._ipc.num_sent_at[slot]

        def wait() -> None:
            self._ipc.await_taken(num_taken, self._deadline_s)

        self._group.attempt(bucket_stage(index, self._buckets), wait)
        return self._ipc.buffers_B[slot]

    def send(self, index: int, packed_B: Tensor) -> None:
        def send() -> None:
            self._ipc.send(Kind.READY, index, self._deadline_s)

        self._group.attempt(bucket_stage(index, self._buckets), send)
        self._ipc.num_sent += 1
        self._ipc.num_sent_at[index % NUM_BUFFERS] = self._ipc.num_sent

    def flush(self) -> None:
        """A no-op: `send` does not queue."""

    def finish(self) -> None:
        """A no-op: receivers may load the last buckets while the sender continues."""

    def _reserve(self, num_bytes: int, device: torch.device) -> None:
        ipc = self._ipc
        if ipc.buffers_B and ipc.buffers_B[0].numel() >= num_bytes:
            return
        if device.type == "cuda":
            ipc.buffers_B = [
                torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)
            ]
            ipc.send_memory(_describe_on_gpu(ipc.buffers_B), None, self._deadline_s)
            return
        descriptor = make_memory(num_bytes * NUM_BUFFERS)
        try:
            ipc.buffers_B = _map_memory(descriptor, num_bytes)
            description = {"device": "cpu", "num_bytes": num_bytes}
            ipc.send_memory(description, descriptor, self._deadline_s)
        finally:
            os.close(descriptor)


class SharedIncoming:
    """Loads out of the sender's buffers; satisfies `Incoming`."""

    def __init__(self, group: EpochGroup, buckets: Sequence[Bucket], device: torch.device) -> None:
        self._group, self._buckets, self._device = group, buckets, device
        self._ipc = group.ipc
        self._deadline_s = group.offer.deadline_s

    def take(self, index: int) -> Tensor:
        """Raises StageFailed, or MemoryRefused when the sender's memory cannot be opened."""
        stage = bucket_stage(index, self._buckets)
        self._group.attempt(stage, lambda: self._await_bucket(index))
        return self._ipc.buffers_B[index % NUM_BUFFERS]

    def release(self, index: int) -> None:
        def send() -> None:
            self._ipc.send(Kind.TAKEN, index, self._deadline_s)

        self._group.attempt(bucket_stage(index, self._buckets), send)

    def _await_bucket(self, index: int) -> None:
        frame = self._ipc.receive(0, self._deadline_s)
        if frame.kind is Kind.MEMORY:
            self._ipc.buffers_B = open_memory(frame.payload, frame.descriptor, self._device)
            frame = self._ipc.receive(0, self._deadline_s)
        if frame.kind is not Kind.READY or frame.number != index:
            raise RuntimeError(f"rank 0 sent {frame.kind.name} {frame.number}")
        if self._buckets[index].num_bytes > self._ipc.buffers_B[0].numel():
            raise RuntimeError("rank 0 shares less memory than a bucket requires")


class MemoryRefused(Exception):
    """The sender's memory cannot be opened here; the message states why."""


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


def open_memory(payload: bytes, descriptor: int | None, device: torch.device) -> list[Tensor]:
    """The sender's buffers, (B,) uint8 each. Closes `descriptor`; raises MemoryRefused."""
    try:
        match json.loads(payload):
            case {"device": "cpu", "num_bytes": int(num_bytes)} if descriptor is not None:
                if not 0 < num_bytes * NUM_BUFFERS <= os.fstat(descriptor).st_size:
                    raise MemoryRefused("the memory is smaller than its description")
                if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise MemoryRefused(
                        "the memory is not sealed: it could shrink while it is read"
                    )
                return _map_memory(descriptor, num_bytes)
            case {"device": "cuda", "gpu": str(gpu), "buffers": list(buffers)} if (
                len(buffers) == NUM_BUFFERS
            ):
                return _open_on_gpu(gpu, buffers, device)
            case _:
                raise MemoryRefused("the description of the memory is malformed")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise MemoryRefused(f"the memory cannot be opened: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _map_memory(descriptor: int, num_bytes: int) -> list[Tensor]:
    mapped = mmap.mmap(descriptor, num_bytes * NUM_BUFFERS)
    with contextlib.suppress(OSError):  # a kernel without huge pages for memory files
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory_B = torch.frombuffer(mapped, dtype=torch.uint8)
    return list(memory_B.split(num_bytes))


def _describe_on_gpu(buffers_B: Sequence[Tensor]) -> dict[str, object]:
    """CUDA IPC handles, with bytes as base64. torch's own sharing would pickle the same fields."""
    torch.cuda.synchronize(buffers_B[0].device)  # earlier kernels may still use this memory
    fields = [buffer_B.untyped_storage()._share_cuda_() for buffer_B in buffers_B]
    return {
        "device": "cuda",
        "gpu": _gpu_name(buffers_B[0].device),
        "buffers": [[_to_plain(value) for value in each] for each in fields],
    }


def _open_on_gpu(gpu: str, buffers: list[Any], device: torch.device) -> list[Tensor]:
    if device.type != "cuda":
        raise MemoryRefused(
            f"the learner's weights are on a GPU and this actor is on '{device}': set"
            " actors.device = 'cuda', or weights.backend = 'gloo'"
        )
    visible = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    ours = [each for each in visible if _gpu_name(each) == gpu]
    if not ours:
        raise MemoryRefused(
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


def _gpu_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


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
