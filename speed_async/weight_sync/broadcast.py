"""TorchSender and TorchReceiver: broadcast of weights from one process to the others, in buckets.

Buckets are sent over a torch.distributed group (gloo, nccl) or through shared memory (ipc).

A transfer has the following stages. Every wait uses the offer's deadline.

1. rendezvous (first transfer of an epoch): every receiver sets "joined" in the sender's store, the
   sender sets "go", and all ranks build the process group;
2. manifest: broadcast as bytes; every receiver sets its verdict in the store, empty or the reason
   of a refusal. The list of tensors is sent once per epoch;
3. bucket k of n: transferred while the sender packs the next bucket and the receiver loads the
   previous one. Contiguous weights (`contiguous.py`) are neither packed nor unpacked where the
   backend allows it.

There is no final acknowledgement: the learner does not wait until actors have loaded the weights.
An actor reports this to the service (`WeightsApplied`). A receiver that dies after its last bucket
reached its host is therefore detected there, or in the next transfer.

Shape legend: B bytes of one bucket or message.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightBackend, WeightOffer
from speed_async.weight_sync.backends import GroupIncoming, GroupOutgoing, Incoming, Outgoing
from speed_async.weight_sync.buckets import Bucket, pack
from speed_async.weight_sync.canary import Canary
from speed_async.weight_sync.channel import LoadTensors, NamedTensor, TransferReport
from speed_async.weight_sync.contiguous import contiguous_view
from speed_async.weight_sync.epoch_group import EpochGroup, StageFailed, name_ranks
from speed_async.weight_sync.handshake import (
    announce,
    collect_refusals,
    collect_verdicts,
    delete_verdicts,
    find_unresponsive,
    gather_members,
    join_epoch,
    mark_done,
    receive_manifest,
    refuse,
    sender_failure_reason,
    sync_error,
)
from speed_async.weight_sync.manifest import Manifest, TensorSpec, describe, matches
from speed_async.weight_sync.membership import Membership
from speed_async.weight_sync.process_group import host_store
from speed_async.weight_sync.shared_memory import MemoryRefused, SharedIncoming, SharedOutgoing

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
        cast: torch.dtype | None = None,
        store_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serves the store at a free port of `host`. `cast` converts floating-point tensors.

        Raises WeightSyncError when `host` is not an address of this machine.
        """
        self._bucket_bytes = bucket_bytes
        self._cast = cast
        self._clock = clock
        self._device = device
        self._specs: tuple[TensorSpec, ...] = ()
        self._membership = Membership(device)
        self._store: Store | None = (store := host_store(host, store_timeout_s))
        self._address = (host, store.port)

    @property
    def store_address(self) -> tuple[str, int]:
        return self._address

    def send(
        self, offer: WeightOffer, tensors: Iterable[NamedTensor], canary: Canary | None = None
    ) -> TransferReport:
        """Broadcasts all tensors, which must not change meanwhile. A no-op for world size 1.

        Raises WeightSyncError naming the stage and the failed ranks.
        """
        started_s = self._clock()
        if offer.rank != 0:
            raise WeightSyncError(f"the sender was offered rank {offer.rank}: it is rank 0")
        weights = dict(named := list(tensors))
        if not matches(self._specs, named, self._cast):
            self._specs = describe(named, self._cast)
        manifest = Manifest(
            policy_version=offer.policy_version,
            bucket_bytes=self._bucket_bytes_over(offer.backend),
            tensors=self._specs,
            canary=canary,
        )
        if offer.world_size == 1:
            return TransferReport(num_bytes=0, num_buckets=0, transfer_s=0.0)
        with self._membership.transfer_group(offer) as group:
            buckets = group.plan(manifest)
            try:
                if not group.formed:
                    gather_members(group, self._open_store())
                announce(group, manifest)
                # A lost member is detected here, while all others still have their old weights.
                collect_verdicts(group)
                self._send_buckets(group, buckets, weights).finish()
            except StageFailed as failure:
                unresponsive = find_unresponsive(group, str(failure))
                if refusals := collect_refusals(group):
                    refused = "; ".join(refusals.values())
                    raise sync_error(
                        offer, f"{refused} ({failure})", missing_ranks=[*refusals]
                    ) from failure
                suffix = f"; no response from {name_ranks(unresponsive)}" if unresponsive else ""
                # The ranks of the failure are certain, the unresponsive ones are likely.
                missing = failure.missing_ranks or unresponsive
                raise sync_error(offer, f"{failure}{suffix}", missing_ranks=missing) from failure
            delete_verdicts(group)
        return _report(buckets, self._clock() - started_s)

    def close(self) -> None:
        """Frees the group and the store. Bounded in time; may be called more than once."""
        self._membership.close()
        self._store = None

    def _open_store(self) -> Store:
        if self._store is None:
            raise WeightSyncError("the weight sender is closed")
        return self._store

    def _send_buckets(
        self, group: EpochGroup, buckets: Sequence[Bucket], weights: dict[str, Tensor]
    ) -> Outgoing:
        """Starts the transfer of all buckets. `finish` of the result waits for them."""
        members, outgoing = self._membership, self._outgoing(group, buckets)
        for index, bucket in enumerate(buckets):
            packed_B = contiguous_view(bucket, weights)
            if packed_B is None or not (
                outgoing.accepts_views and packed_B.device == members.transfer_device(group)
            ):
                buffer_B = outgoing.acquire(index)
                if packed_B is None:
                    pack(weights, members.views.of(index, bucket, buffer_B))
                else:
                    buffer_B[: bucket.num_bytes].copy_(packed_B, non_blocking=True)
                packed_B = buffer_B[: bucket.num_bytes]
            members.synchronize()
            outgoing.send(index, packed_B)
        outgoing.flush()
        return outgoing

    def _bucket_bytes_over(self, backend: WeightBackend) -> int:
        cached = backend == "ipc" and self._device.type == "cpu"
        return min(self._bucket_bytes, CACHED_BUCKET_BYTES) if cached else self._bucket_bytes

    def _outgoing(self, group: EpochGroup, buckets: Sequence[Bucket]) -> Outgoing:
        if group.offer.backend == "ipc":
            return SharedOutgoing(group, buckets, self._device)
        return GroupOutgoing(group, buckets, self._membership.reserve(group, buckets))


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A receiver's own tensors whose memory has the layout of their bucket."""

    view_B: Tensor
    tensors: list[NamedTensor]


class TorchReceiver:
    """Any rank other than 0; satisfies `WeightReceiver`. The sender sets the bucket size."""

    def __init__(
        self,
        *,
        device: torch.device,
        in_place: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`in_place` copies a whole bucket into `expected` where its memory has the same layout.

        `load` is then called with an empty list before the first byte of the bucket is written, and
        with the tensors of `expected` afterwards.
        """
        self._device = device
        self._in_place = in_place
        self._clock = clock
        self._membership = Membership(device)

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
        started_s = self._clock()
        if not 0 < offer.rank < offer.world_size:
            raise WeightSyncError(
                f"a receiver was offered rank {offer.rank} of {offer.world_size}:"
                " receivers are ranks 1 and up"
            )
        with self._membership.transfer_group(offer) as group:
            try:
                if not group.formed:
                    join_epoch(group)
                predicted = group.last_plan  # overlaps with the wait for the sender
                targets = self._targets(predicted, expected)
                manifest = receive_manifest(group, expected)
                buckets = group.plan(manifest)
                if buckets is not predicted:
                    targets = self._targets(buckets, expected)
                self._load_buckets(group, buckets, targets, load)
                mark_done(group)
            except MemoryRefused as error:
                raise refuse(group, f"shared memory: {error}", str(error)) from error
            except StageFailed as failure:
                where = f", waiting for rank 0 at {offer.store_host}:{offer.store_port}"
                reason = sender_failure_reason(group, str(failure))
                raise sync_error(offer, f"{failure}{where}{reason}") from failure
        return _report(buckets, self._clock() - started_s, manifest.canary)

    def close(self) -> None:
        """Frees the group. Bounded in time; may be called more than once."""
        self._membership.close()

    def _load_buckets(
        self,
        group: EpochGroup,
        buckets: Sequence[Bucket],
        targets: Sequence[Target | None],
        load: LoadTensors,
    ) -> None:
        members = self._membership
        incoming, started = self._incoming(group, buckets), False
        for index, (bucket, target) in enumerate(zip(buckets, targets, strict=True)):
            received_B = incoming.take(index)
            if target is None:
                load(members.views.of(index, bucket, received_B))
            else:
                if not started:
                    load([])
                target.view_B.copy_(received_B[: bucket.num_bytes], non_blocking=True)
                load(target.tensors)
            started = True
            members.synchronize()
            incoming.release(index)

    def _targets(
        self, buckets: Sequence[Bucket], expected: Sequence[NamedTensor]
    ) -> list[Target | None]:
        """For each bucket, its contiguous view of `expected`, or None."""
        if not self._in_place:
            return [None] * len(buckets)
        ours = dict(expected)
        targets: list[Target | None] = []
        for bucket in buckets:
            names = [span.spec.name for span in bucket.spans]
            view_B = contiguous_view(bucket, ours) if all(name in ours for name in names) else None
            if view_B is None:
                targets.append(None)
            else:
                targets.append(Target(view_B=view_B, tensors=[(n, ours[n]) for n in names]))
        return targets

    def _incoming(self, group: EpochGroup, buckets: Sequence[Bucket]) -> Incoming:
        if group.offer.backend == "ipc":
            return SharedIncoming(group, buckets, self._device)
        return GroupIncoming(group, buckets, self._membership.reserve(group, buckets))


def _report(
    buckets: Sequence[Bucket], transfer_s: float, canary: Canary | None = None
) -> TransferReport:
    return TransferReport(
        num_bytes=sum(bucket.num_bytes for bucket in buckets),
        num_buckets=len(buckets),
        transfer_s=transfer_s,
        canary=canary,
    )
