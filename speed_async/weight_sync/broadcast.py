"""TorchSender and TorchReceiver: broadcast of weights from one process to the others, in buckets.

Buckets are sent over a torch.distributed group (gloo, nccl) or through shared memory (ipc).

A transfer has the following stages. Every wait uses the offer's deadline.

1. rendezvous (first transfer of an epoch): every receiver sets "joined" in the sender's store, the
   sender sets "go", and all ranks create the transport;
2. manifest: sent through the store; every receiver sets its verdict there, empty or the reason of a
   refusal. The list of tensors is sent once per epoch;
3. bucket k of n: transferred while the sender packs the next bucket and the receiver loads the
   previous one. Contiguous weights are neither packed nor unpacked where the backend allows it.

There is no final acknowledgement: the learner does not wait until actors have loaded the weights.
An actor reports this to the service (`WeightsApplied`). A receiver that dies after its last bucket
reached its host is therefore detected there, or in the next transfer.

Shape legend: B bytes of one bucket or message.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import (
    Bucket,
    contiguous_view,
    pack,
    transfer_report,
)
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import LoadTensors, NamedTensor, TransferReport, WholeTensors
from speed_async.weight_sync.current_epoch import CurrentEpoch
from speed_async.weight_sync.digests import tensor_digests
from speed_async.weight_sync.epoch_group import EpochGroup
from speed_async.weight_sync.manifest import (
    KnownTensors,
    Manifest,
    accept_manifest,
    describe,
    encode_manifest,
    matches,
)
from speed_async.weight_sync.process_group import host_store

CACHED_BUCKET_BYTES = 4 * 1024 * 1024
"""Largest bucket in shared host memory, so that it is still cached when it is loaded (512 MiB in
30 ms, compared with 50 ms in buckets of 64 MiB)."""


class TorchSender:
    """Rank 0. Hosts the store of all epochs; satisfies `WeightSender`."""

    def __init__(
        self,
        *,
        host: str,
        bucket_bytes: int,
        device: torch.device,
        store_timeout_s: float = 60.0,
    ) -> None:
        """Serves the store at a free port of `host`.

        Raises WeightSyncError when `host` is not an address of this machine.
        """
        self._bucket_bytes = bucket_bytes
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        """Not the default one, where the learner meanwhile computes a gradient."""
        self._tensors = KnownTensors(())
        self._epoch = CurrentEpoch(device)
        self._store: Store | None = (store := host_store(host, store_timeout_s))
        self._address = (host, store.port)

    @property
    def store_address(self) -> tuple[str, int]:
        return self._address

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        """Broadcasts all tensors, which must not change meanwhile. On a GPU, all work that writes
        them must be complete. A no-op for world size 1.

        Floating-point tensors are converted to the dtypes that the receivers state.
        Raises WeightSyncError naming the stage and the failed ranks.
        """
        started_s = time.monotonic()
        if offer.rank != 0:
            raise WeightSyncError(f"the sender was offered rank {offer.rank}: it is rank 0")
        if offer.world_size == 1:
            return TransferReport(num_bytes=0, num_buckets=0, transfer_s=0.0)
        if self._store is None:
            raise WeightSyncError("the weight sender is closed")
        bucket_bytes = self._bucket_bytes
        if offer.backend == "ipc" and self._device.type == "cpu":
            bucket_bytes = min(bucket_bytes, CACHED_BUCKET_BYTES)
        weights = dict(named := list(tensors))
        if len(weights) < len(named):
            describe(named)  # raises for the duplicate name
        whole = whole or (lambda names: {name: weights[name] for name in names})
        with self._epoch.transfer(offer) as group, _used(self._stream):
            group.form(self._store, lost)
            if not matches(self._tensors.specs, named, group.cast):
                self._tensors = KnownTensors(describe(named, group.cast))
            manifest = Manifest(
                policy_version=offer.policy_version,
                bucket_bytes=bucket_bytes,
                tensors=self._tensors.specs,
                canary=canary,
                # Of the weights themselves, so that a wrongly packed bucket is detected as well.
                digests=tensor_digests(
                    (spec.name, whole([spec.name])[spec.name].to(spec.dtype))
                    for spec in self._tensors.specs
                ),
            )
            buckets = group.plan(manifest)
            with group.stage("buffers"):
                memory = group.transport.begin_sending(buckets, offer.deadline_s)
            payload = encode_manifest(replace(manifest, memory=memory), group.known)
            group.announce(payload, lost)
            group.known = self._tensors
            self._send_buckets(group, buckets, whole)
        return transfer_report(buckets, time.monotonic() - started_s)

    def close(self) -> None:
        """Frees the group and the store. Bounded in time; may be called more than once."""
        self._epoch.close()
        self._store = None

    def _send_buckets(
        self, group: EpochGroup, buckets: Sequence[Bucket], whole: WholeTensors
    ) -> None:
        stage = ""
        for index, bucket in enumerate(buckets):
            stage = bucket_stage(index, buckets)
            with group.stage(stage):
                buffer_B = group.transport.acquire(index)
            packed_B = buffer_B[: bucket.num_bytes]
            weights = whole(bucket.names)
            view_B = contiguous_view(bucket, weights)
            if view_B is None:
                pack(weights, group.views.of(index, bucket, buffer_B))
            elif group.transport.can_send(view_B):
                packed_B = view_B
            else:
                packed_B.copy_(view_B, non_blocking=True)
            _synchronize(self._device)
            with group.stage(stage):
                group.transport.send(index, packed_B)
        with group.stage(stage):
            group.transport.finish()


class TorchReceiver:
    """Any rank other than 0; satisfies `WeightReceiver`. The sender sets the bucket size."""

    def __init__(
        self,
        *,
        device: torch.device,
        in_place: bool = False,
    ) -> None:
        """`in_place` copies a whole bucket into `expected` where its memory has the same layout.

        `load` is then called with an empty list before the first byte of the bucket is written, and
        with the tensors of `expected` afterwards.
        """
        self._device = device
        self._in_place = in_place
        self._epoch = CurrentEpoch(device)

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        """Receives one broadcast. `load` is called with the complete tensors of each bucket.

        Tensors are in host memory with gloo (pinned when the device is a GPU), in device memory
        with NCCL, and in the sender's shared memory with ipc.
        Raises WeightSyncError naming the stage, or the difference from `expected`, in which case
        nothing was loaded. An exception of `load` makes this member's epoch unusable and
        propagates.
        """
        started_s = time.monotonic()
        if not 0 < offer.rank < offer.world_size:
            raise WeightSyncError(
                f"a receiver was offered rank {offer.rank} of {offer.world_size}:"
                " receivers are ranks 1 and up"
            )
        with self._epoch.transfer(offer) as group:
            group.form(expected=expected)
            manifest, buckets = _accept(group, expected)
            self._load_buckets(group, buckets, dict(expected), load)
        return transfer_report(buckets, time.monotonic() - started_s, manifest)

    def close(self) -> None:
        """Frees the group. Bounded in time; may be called more than once."""
        self._epoch.close()

    def _load_buckets(
        self,
        group: EpochGroup,
        buckets: Sequence[Bucket],
        ours: dict[str, Tensor],
        load: LoadTensors,
    ) -> None:
        for index, bucket in enumerate(buckets):
            target_B = contiguous_view(bucket, ours) if self._in_place else None
            with group.stage(bucket_stage(index, buckets)):
                received_B = group.transport.take(index)
            if target_B is None:
                load(group.views.of(index, bucket, received_B))
            else:
                if index == 0:
                    load([])
                target_B.copy_(received_B[: bucket.num_bytes], non_blocking=True)
                load([(name, ours[name]) for name in bucket.names])
            _synchronize(self._device)
            with group.stage(bucket_stage(index, buckets)):
                group.transport.release()


def _accept(
    group: EpochGroup, expected: Sequence[NamedTensor]
) -> tuple[Manifest, tuple[Bucket, ...]]:
    """Receiver: the manifest, verified and answered, and its buckets."""
    payload, offer = group.receive_manifest(), group.offer
    try:
        manifest = accept_manifest(payload, offer.policy_version, expected, group.known)
        buckets = group.plan(manifest)
        with group.stage("manifest"):
            group.transport.begin_receiving(buckets, offer.deadline_s, manifest.memory)
    except WeightSyncError as error:
        group.answer(str(error))
        raise group.error(f"manifest: {error}") from error
    group.answer("")
    if group.known is None or group.known.specs is not manifest.tensors:
        group.known = KnownTensors(manifest.tensors)
    return manifest, buckets


def bucket_stage(index: int, buckets: Sequence[Bucket]) -> str:
    return f"bucket {index + 1} of {len(buckets)}"


def _used(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _synchronize(device: torch.device) -> None:
    """Waits for copies queued on the GPU, so that their buffers can be used."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
