"""TorchSender and TorchReceiver: weights from one process to the others, bucket by bucket.

They travel over a torch.distributed group (gloo, nccl) or through shared memory (ipc).

Stages of one transfer; every wait in them has the offer's deadline:

1. rendezvous (first transfer of an epoch): every receiver says "joined" in the sender's store,
   the sender answers "go", all build the process group;
2. manifest: broadcast as bytes; every receiver answers in the store: accepted, or why not. Its
   list of tensors travels once an epoch;
3. bucket k of n: travels while the sender packs, and the receiver loads, its neighbour. What lies
   in memory as it travels (`flat.py`) is neither packed nor loaded where the backend allows it.

There is no final acknowledgement: the learner does not wait for actors to load. An actor reports
that over the wire (`WeightsApplied`). A receiver that dies after its last bucket reached its
host is therefore noticed there, or in the next transfer.

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
    forget_verdicts,
    gather_members,
    hear_verdicts,
    join_epoch,
    receive_manifest,
    refusals_of,
    refuse,
    say_done,
    sync_error,
    what_sender_said,
    who_is_silent,
)
from speed_async.weight_sync.manifest import Manifest, TensorSpec, describe, describes
from speed_async.weight_sync.membership import Membership
from speed_async.weight_sync.process_group import host_store
from speed_async.weight_sync.shared_memory import MemoryRefused, SharedIncoming, SharedOutgoing

CACHED_BUCKET_BYTES = 4 * 1024 * 1024
"""Most that is packed into shared host memory at once: it is then still cached when it is loaded
(512 MiB in 30 ms; in buckets of 64 MiB it took 50)."""


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
        """Serve the store at a free port of `host`; `cast` converts floating-point tensors.

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
        """Broadcast all tensors; they must not change meanwhile. World size 1 moves nothing.

        Raises WeightSyncError naming the stage and the ranks to blame.
        """
        began_s = self._clock()
        if offer.rank != 0:
            raise WeightSyncError(f"the sender was offered rank {offer.rank}: it is rank 0")
        weights = dict(named := list(tensors))
        if not describes(self._specs, named, self._cast):
            self._specs = describe(named, self._cast)
        manifest = Manifest(
            policy_version=offer.policy_version,
            bucket_bytes=self._bucket_bytes_over(offer.backend),
            tensors=self._specs,
            canary=canary,
        )
        if offer.world_size == 1:
            return TransferReport(num_bytes=0, num_buckets=0, transfer_s=0.0)
        with self._membership.taking_part(offer) as group:
            buckets = group.plan(manifest)
            try:
                if not group.formed:
                    gather_members(group, self._open_store())
                announce(group, manifest)
                # A member that is gone is found out here, when no other has lost its old weights.
                hear_verdicts(group)
                self._pass_on(group, buckets, weights).finish()
            except StageFailed as failure:
                silent = who_is_silent(group, str(failure))
                if refusals := refusals_of(group):
                    refused = "; ".join(refusals.values())
                    raise sync_error(
                        offer, f"{refused} ({failure})", missing_ranks=[*refusals]
                    ) from failure
                blame = f"; no sign of life from {name_ranks(silent)}" if silent else ""
                missing = failure.missing_ranks or silent  # the former are sure, the latter likely
                raise sync_error(offer, f"{failure}{blame}", missing_ranks=missing) from failure
            forget_verdicts(group)
        return _report(buckets, self._clock() - began_s)

    def close(self) -> None:
        """Free group and store. Never waits long, whatever the peers do; may be called twice."""
        self._membership.close()
        self._store = None

    def _open_store(self) -> Store:
        if self._store is None:
            raise WeightSyncError("the weight sender is closed")
        return self._store

    def _pass_on(
        self, group: EpochGroup, buckets: Sequence[Bucket], weights: dict[str, Tensor]
    ) -> Outgoing:
        """All buckets are on their way when this returns."""
        members, outgoing = self._membership, self._outgoing(group, buckets)
        for index, bucket in enumerate(buckets):
            packed_B = contiguous_view(bucket, weights)
            if packed_B is None or not (
                outgoing.takes_views and packed_B.device == members.travels_from(group)
            ):
                buffer_B = outgoing.borrow(index)
                if packed_B is None:
                    pack(weights, members.views.of(index, bucket, buffer_B))
                else:
                    buffer_B[: bucket.num_bytes].copy_(packed_B, non_blocking=True)
                packed_B = buffer_B[: bucket.num_bytes]
            members.settle()
            outgoing.pass_on(index, packed_B)
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
    """Where a receiver's own tensors lie just as their bucket travels."""

    home_B: Tensor
    tensors: list[NamedTensor]


class TorchReceiver:
    """Any rank but 0; satisfies `WeightReceiver`. The sender decides the bucket size."""

    def __init__(
        self,
        *,
        device: torch.device,
        in_place: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`in_place`: copy a bucket as a whole into `expected` where that lies as it travels.

        `load` is then called with no tensors before the bucket's first byte is written, and is
        given the very tensors of `expected` afterwards.
        """
        self._device = device
        self._in_place = in_place
        self._clock = clock
        self._membership = Membership(device)

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        """Take part in one broadcast; `load` gets whole tensors, bucket by bucket.

        They are host memory with gloo (pinned when the device is a GPU), device memory with NCCL,
        and with ipc what the sender shares.
        Raises WeightSyncError naming the stage, or what differs from `expected` (then nothing was
        loaded). An exception of `load` ends this member's epoch and propagates.
        """
        began_s = self._clock()
        if not 0 < offer.rank < offer.world_size:
            raise WeightSyncError(
                f"a receiver was offered rank {offer.rank} of {offer.world_size}:"
                " receivers are ranks 1 and up"
            )
        with self._membership.taking_part(offer) as group:
            try:
                if not group.formed:
                    join_epoch(group)
                likely = group.last_plan  # worked out while the sender is waited for anyway
                targets = self._targets(likely, expected)
                manifest = receive_manifest(group, expected)
                buckets = group.plan(manifest)
                if buckets is not likely:
                    targets = self._targets(buckets, expected)
                self._load_buckets(group, buckets, targets, load)
                say_done(group)
            except MemoryRefused as reason:
                raise refuse(group, f"shared memory: {reason}", str(reason)) from reason
            except StageFailed as failure:
                where = f", waiting for rank 0 at {offer.store_host}:{offer.store_port}"
                said = what_sender_said(group, str(failure))
                raise sync_error(offer, f"{failure}{where}{said}") from failure
        return _report(buckets, self._clock() - began_s, manifest.canary)

    def close(self) -> None:
        """Free the group. Never waits long, whatever the peers do; may be called twice."""
        self._membership.close()

    def _load_buckets(
        self,
        group: EpochGroup,
        buckets: Sequence[Bucket],
        targets: Sequence[Target | None],
        load: LoadTensors,
    ) -> None:
        members = self._membership
        incoming, begun = self._incoming(group, buckets), False
        for index, (bucket, target) in enumerate(zip(buckets, targets, strict=True)):
            came_B = incoming.take(index)
            if target is None:
                load(members.views.of(index, bucket, came_B))
            else:
                if not begun:
                    load([])
                target.home_B.copy_(came_B[: bucket.num_bytes], non_blocking=True)
                load(target.tensors)
            begun = True
            members.settle()
            incoming.release(index)

    def _targets(
        self, buckets: Sequence[Bucket], expected: Sequence[NamedTensor]
    ) -> list[Target | None]:
        """For each bucket its own place in `expected`, where there is one to write into."""
        if not self._in_place:
            return [None] * len(buckets)
        ours = dict(expected)
        targets: list[Target | None] = []
        for bucket in buckets:
            names = [span.spec.name for span in bucket.spans]
            home_B = contiguous_view(bucket, ours) if all(name in ours for name in names) else None
            if home_B is None:
                targets.append(None)
            else:
                targets.append(Target(home_B=home_B, tensors=[(n, ours[n]) for n in names]))
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
