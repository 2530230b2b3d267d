"""Weight sender and receivers within one process, with a record of all calls.

They implement the contract of the real ones and rendezvous in a MemoryStore; the store address of
an offer is ignored. A receiver loads copies, so later optimizer steps do not change them.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition

from torch import Tensor

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import plan_buckets, transfer_report
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import LoadTensors, NamedTensor, TransferReport, WholeTensors
from speed_async.weight_sync.digests import tensor_digests
from speed_async.weight_sync.float_dtypes import FloatDtypes, agreed_dtypes, float_dtypes
from speed_async.weight_sync.manifest import Manifest, accept_manifest, describe, encode_manifest
from speed_async.weight_sync.process_group import name_ranks

ADDRESS = ("memory", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SendCall:
    offer: WeightOffer
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiveCall:
    offer: WeightOffer
    expected_names: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class _Transfer:
    """Shared state of the members of one transfer."""

    joined: dict[int, FloatDtypes] = field(default_factory=dict)
    payload: bytes | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    verdicts: dict[int, str] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    failure: str = ""


class MemoryStore:
    """The rendezvous point of the members."""

    def __init__(self) -> None:
        self.changed = Condition()
        self._transfers: dict[tuple[int, int], _Transfer] = {}
        self._num_finished: Counter[tuple[int, int]] = Counter()
        self._failed_epochs: dict[int, str] = {}

    def join(self, offer: WeightOffer) -> _Transfer:
        """Join the transfer of this offer. Raises WeightSyncError when its epoch is unusable."""
        with self.changed:
            if offer.epoch in self._failed_epochs:
                raise WeightSyncError(
                    f"epoch {offer.epoch} is unusable, a new epoch is required:"
                    f" {self._failed_epochs[offer.epoch]}"
                )
            return self._transfers.setdefault(self._key(offer), _Transfer())

    def wait(
        self, offer: WeightOffer, transfer: _Transfer, stage: str, ready: Callable[[], bool]
    ) -> bool:
        """Whether `ready()` became true before the deadline (the caller holds `changed`).

        Raises WeightSyncError when another member failed in the meantime.
        """
        in_time = self.changed.wait_for(lambda: ready() or bool(transfer.failure), offer.deadline_s)
        if transfer.failure:
            raise WeightSyncError(f"{stage}: {transfer.failure}")
        return in_time

    def finish(self, offer: WeightOffer, transfer: _Transfer) -> None:
        """Mark one member as finished; the last one frees the copies of the transfer."""
        with self.changed:
            transfer.finished.add(offer.rank)
            if len(transfer.finished) == offer.world_size:
                del self._transfers[self._key(offer)]
            self._num_finished[offer.epoch, offer.rank] += 1

    def _key(self, offer: WeightOffer) -> tuple[int, int]:
        """Members join the n-th transfer of an epoch, as in a process group."""
        return offer.epoch, self._num_finished[offer.epoch, offer.rank]

    def fail(
        self, offer: WeightOffer, transfer: _Transfer, reason: str, missing: Sequence[int] = ()
    ) -> WeightSyncError:
        """Fail the epoch for all members; returns the error to raise (caller holds `changed`)."""
        text = f"policy version {offer.policy_version}, epoch {offer.epoch}, {reason}"
        self._transfers.pop(self._key(offer), None)
        transfer.failure = self._failed_epochs[offer.epoch] = text
        self.changed.notify_all()
        return WeightSyncError(text, missing_ranks=missing)


class MemorySender:
    """Implements `WeightSender`."""

    def __init__(
        self,
        store: MemoryStore,
        *,
        bucket_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.calls: list[SendCall] = []
        self._store = store
        self._bucket_bytes = bucket_bytes
        self._clock = clock

    @property
    def store_address(self) -> tuple[str, int]:
        return ADDRESS

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        started_s = self._clock()
        named = list(tensors)
        if whole is not None:
            named = list(whole([name for name, _ in named]).items())
        self.calls.append(SendCall(offer=offer, names=tuple(name for name, _ in named)))
        if offer.world_size == 1:
            return TransferReport(num_bytes=0, num_buckets=0, transfer_s=0.0)
        describe(named)  # raises for a duplicate name
        transfer = self._store.join(offer)
        with self._store.changed:
            self._await_all(offer, transfer, "rendezvous", transfer.joined, "never joined")
            try:
                specs = describe(named, agreed_dtypes(transfer.joined))
            except WeightSyncError as error:
                reason = f"rendezvous: {error}"
                raise self._store.fail(offer, transfer, reason, error.missing_ranks) from None
            transfer.tensors = {
                spec.name: tensor.to(dtype=spec.dtype, copy=True)
                for spec, (_, tensor) in zip(specs, named, strict=True)
            }
            manifest = Manifest(
                policy_version=offer.policy_version,
                bucket_bytes=self._bucket_bytes,
                tensors=specs,
                canary=canary,
                digests=tensor_digests(transfer.tensors.items()),
            )
            transfer.payload = encode_manifest(manifest)
            self._store.changed.notify_all()
            self._await_all(offer, transfer, "manifest", transfer.verdicts, "did not answer")
            rejections = {
                rank: f"rank {rank} refused: {error}"
                for rank, error in transfer.verdicts.items()
                if error
            }
            if rejections:
                reason = f"manifest: {'; '.join(rejections.values())}"
                raise self._store.fail(offer, transfer, reason, [*rejections])
        self._store.finish(offer, transfer)
        buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        return transfer_report(buckets, self._clock() - started_s)

    def close(self) -> None:
        """No resources to free."""

    def _await_all(
        self,
        offer: WeightOffer,
        transfer: _Transfer,
        stage: str,
        present: Collection[int],
        absence: str,
    ) -> None:
        ranks = range(1, offer.world_size)
        if not self._store.wait(offer, transfer, stage, lambda: all(r in present for r in ranks)):
            absent = [rank for rank in ranks if rank not in present]
            reason = (
                f"{stage} failed after {offer.deadline_s:.1f} s ({name_ranks(absent)} {absence})"
            )
            raise self._store.fail(offer, transfer, reason, absent)


class MemoryReceiver:
    """Implements `WeightReceiver`."""

    def __init__(self, store: MemoryStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.calls: list[ReceiveCall] = []
        self._store = store
        self._clock = clock

    def receive(
        self, offer: WeightOffer, expected: Sequence[NamedTensor], load: LoadTensors
    ) -> TransferReport:
        started_s = self._clock()
        self.calls.append(
            ReceiveCall(offer=offer, expected_names=tuple(name for name, _ in expected))
        )
        transfer = self._store.join(offer)
        with self._store.changed:
            manifest = self._accept(offer, transfer, expected)
        loaded = False
        try:
            _load(manifest, transfer, load)
            loaded = True
        finally:
            if not loaded:
                with self._store.changed:
                    reason = f"rank {offer.rank} failed to load: {sys.exception()}"
                    self._store.fail(offer, transfer, reason)
        self._store.finish(offer, transfer)
        buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        return transfer_report(buckets, self._clock() - started_s, manifest)

    def close(self) -> None:
        """No resources to free."""

    def _accept(
        self, offer: WeightOffer, transfer: _Transfer, expected: Sequence[NamedTensor]
    ) -> Manifest:
        transfer.joined[offer.rank] = float_dtypes(expected)
        self._store.changed.notify_all()

        def has_manifest() -> bool:
            return transfer.payload is not None

        if not self._store.wait(offer, transfer, "rendezvous", has_manifest):
            raise WeightSyncError(
                f"policy version {offer.policy_version}, epoch {offer.epoch}, rendezvous failed"
                f" after {offer.deadline_s:.1f} s (no sign of rank 0)"
            )
        assert transfer.payload is not None
        try:
            manifest = accept_manifest(transfer.payload, offer.policy_version, expected)
        except WeightSyncError as error:
            transfer.verdicts[offer.rank] = str(error)
            raise
        else:
            transfer.verdicts[offer.rank] = ""
            return manifest
        finally:
            self._store.changed.notify_all()


def _load(manifest: Manifest, transfer: _Transfer, load: LoadTensors) -> None:
    for bucket in plan_buckets(manifest.tensors, manifest.bucket_bytes):
        copies = [(name, transfer.tensors[name].clone()) for name in bucket.names]
        load(copies)
        for _, copy in copies:
            copy.zero_()  # like a reused buffer, to detect receivers that keep the tensors
