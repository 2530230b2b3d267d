"""TorchSender and TorchReceiver: weights over a torch.distributed group, bucket by bucket.

Stages of one transfer; every wait in them has the offer's deadline:

1. rendezvous (first transfer of an epoch): every receiver says "joined" in the sender's store,
   the sender answers "go", all build the process group;
2. manifest: broadcast as bytes; every receiver answers in the store: accepted, or why not;
3. bucket k of n: broadcast while the sender packs, and the receiver loads, its neighbour.

There is no final acknowledgement: the learner does not wait for actors to load. An actor reports
that over the wire (`WeightsApplied`). A receiver that dies after its last bucket reached its
host is therefore noticed there, or in the next transfer.

Shape legend: B bytes of one bucket or message.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weights.buckets import Bucket, pack, plan_buckets, unpack
from speed_async.weights.canary import Canary
from speed_async.weights.channel import LoadTensors, NamedTensor, TransferReport
from speed_async.weights.handshake import (
    announce,
    forget_verdicts,
    gather_members,
    join_epoch,
    receive_manifest,
    say_done,
    sync_error,
    what_sender_said,
    who_is_silent,
)
from speed_async.weights.manifest import Manifest, describe
from speed_async.weights.membership import EpochGroup, Membership, StageFailed, name_ranks
from speed_async.weights.process_group import host_store


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
        manifest = Manifest(
            policy_version=offer.policy_version,
            bucket_bytes=self._bucket_bytes,
            tensors=describe(named, self._cast),
            canary=canary,
        )
        if offer.world_size == 1:
            return TransferReport(num_bytes=0, num_buckets=0, transfer_s=0.0)
        buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        with self._membership.taking_part(offer) as group:
            try:
                if not group.formed:
                    gather_members(group, self._open_store())
                announce(group, manifest)
                self._send_buckets(group, buckets, weights)
            except StageFailed as failure:
                silent = who_is_silent(group, str(failure))
                blame = f"; no sign of life from {name_ranks(silent)}" if silent else ""
                missing = failure.missing_ranks or silent  # the former are sure, the latter likely
                raise sync_error(offer, f"{failure}{blame}", missing_ranks=missing) from failure
        return _report(buckets, self._clock() - began_s)

    def close(self) -> None:
        """Free group and store. Never waits long, whatever the peers do; may be called twice."""
        self._membership.close()
        self._store = None

    def _open_store(self) -> Store:
        if self._store is None:
            raise WeightSyncError("the weight sender is closed")
        return self._store

    def _send_buckets(
        self, group: EpochGroup, buckets: Sequence[Bucket], weights: dict[str, Tensor]
    ) -> None:
        buffers = self._membership.reserve(group, buckets)
        in_flight: list[Future[None]] = []
        for index, bucket in enumerate(buckets):
            if index >= 2:  # the buffer's last bucket has to be gone before it is packed again
                group.wait(_stage(index - 2, buckets), in_flight[index - 2])
            packed_B = pack(bucket, weights, buffers.get(index))
            self._membership.settle()
            in_flight.append(group.broadcast(packed_B))
        for index in range(max(0, len(buckets) - 2), len(buckets)):
            group.wait(_stage(index, buckets), in_flight[index])
        forget_verdicts(group)


class TorchReceiver:
    """Any rank but 0; satisfies `WeightReceiver`. The sender decides the bucket size."""

    def __init__(
        self, *, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._membership = Membership(device)

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        """Take part in one broadcast; `load` gets whole tensors, bucket by bucket.

        They are host memory with gloo (pinned when the device is a GPU), device memory with NCCL.
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
                manifest = receive_manifest(group, expected)
                buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
                self._load_buckets(group, buckets, load)
            except StageFailed as failure:
                where = f", waiting for rank 0 at {offer.store_host}:{offer.store_port}"
                said = what_sender_said(group, str(failure))
                raise sync_error(offer, f"{failure}{where}{said}") from failure
        return _report(buckets, self._clock() - began_s, manifest.canary)

    def close(self) -> None:
        """Free the group. Never waits long, whatever the peers do; may be called twice."""
        self._membership.close()

    def _load_buckets(
        self, group: EpochGroup, buckets: Sequence[Bucket], load: LoadTensors
    ) -> None:
        buffers = self._membership.reserve(group, buckets)
        incoming = [buffers.get(index)[: bucket.num_bytes] for index, bucket in enumerate(buckets)]
        in_flight = [group.broadcast(buffer_B) for buffer_B in incoming[:2]]
        for index, bucket in enumerate(buckets):
            group.wait(_stage(index, buckets), in_flight[index])
            load(unpack(bucket, incoming[index]))
            self._membership.settle()
            if index + 2 < len(buckets):
                in_flight.append(group.broadcast(incoming[index + 2]))
        say_done(group)


def _stage(index: int, buckets: Sequence[Bucket]) -> str:
    return f"bucket {index + 1} of {len(buckets)}"


def _report(
    buckets: Sequence[Bucket], transfer_s: float, canary: Canary | None = None
) -> TransferReport:
    return TransferReport(
        num_bytes=sum(bucket.num_bytes for bucket in buckets),
        num_buckets=len(buckets),
        transfer_s=transfer_s,
        canary=canary,
    )
