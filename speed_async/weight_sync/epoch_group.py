"""The weight group of one epoch: rendezvous, messages, and the deadline of every stage.

Messages are keys in the sender's store (epoch_store.py). The buckets are sent by the transport of
the backend.
"""

import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import Bucket, Views, plan_buckets
from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.epoch_store import EpochStore, run_bounded
from speed_async.weight_sync.float_dtypes import (
    FloatDtypes,
    agreed_dtypes,
    decode_dtypes,
    encode_dtypes,
    float_dtypes,
)
from speed_async.weight_sync.ipc import (
    IpcTransport,
    host_sockets,
    join_sockets,
    machine_identity,
    machine_mismatches,
)
from speed_async.weight_sync.manifest import KnownTensors, Manifest
from speed_async.weight_sync.nccl import gpu_conflicts, gpu_identity
from speed_async.weight_sync.process_group import (
    GroupTransport,
    MemberLeft,
    describe_error,
    make_group,
    name_ranks,
    reach_store,
)

GRACE_S = 0.5
"""Time after a failure that peers have to report their state."""
MAX_REASON = 1000


class StageFailed(Exception):
    """A stage of a transfer failed; `EpochGroup.explain` adds the peers that it waited for."""

    def __init__(self, stage: str, waited_s: float, reason: str, ranks: Sequence[int]) -> None:
        super().__init__(f"{stage} failed after {waited_s:.1f} s ({reason})")
        self.missing_ranks = tuple(ranks)


class EpochGroup:
    """One member of the group of an epoch. Rank 0 is the sender."""

    def __init__(self, offer: WeightOffer, device: torch.device) -> None:
        self.offer = offer
        self.known: KnownTensors | None = None
        """The tensors that later manifests refer to by their digest."""
        self.cast = FloatDtypes()
        """Sender: the dtypes that the receivers have stated."""
        self.views = Views()
        self._num_transfers = 0
        self._plan: tuple[object, tuple[Bucket, ...]] = (None, ())
        self._device = device
        self._store: EpochStore | None = None
        self._transport: GroupTransport | IpcTransport | None = None
        self._stuck = False

    @property
    def transport(self) -> GroupTransport | IpcTransport:
        assert self._transport is not None, "the group is not formed"
        return self._transport

    @property
    def _messages(self) -> EpochStore:
        assert self._store is not None, "the rendezvous has not begun"
        return self._store

    def form(
        self,
        store: Store | None = None,
        lost: Collection[int] = (),
        *,
        expected: Sequence[NamedTensor] = (),
    ) -> None:
        """Waits until every receiver has joined, then creates the transport; the first transfer of
        an epoch calls it. The sender passes its `store` and the ranks that are lost, a receiver the
        tensors it will load."""
        if self._transport is not None:
            return
        with self.stage("rendezvous"):
            offer, is_sender = self.offer, store is not None
            if store is None:
                store = run_bounded(lambda: reach_store(offer), offer.deadline_s)
            self._store = EpochStore(store, epoch=offer.epoch, world_size=offer.world_size)
            if is_sender:
                self._await_receivers(lost)
            else:
                self._await_sender(expected)
            part = self._store.part("group")
            self._transport = run_bounded(lambda: self._connect(part), offer.deadline_s)

    def plan(self, manifest: Manifest) -> tuple[Bucket, ...]:
        """Buckets of these tensors. The result is the same object while the tensors and the bucket
        size are unchanged."""
        wanted = manifest.tensors, manifest.bucket_bytes
        if self._plan[0] != wanted:
            self._plan = wanted, plan_buckets(*wanted)
        return self._plan[1]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Converts failures of the block to StageFailed."""
        started_s = time.monotonic()
        try:
            yield
        except TimeoutError as error:
            self._stuck = True
            raise StageFailed(name, time.monotonic() - started_s, "no response", ()) from error
        except RuntimeError as error:  # torch.distributed raises it for all failures
            # The frames keep the process group alive, which must be freed to wake its members.
            traceback.clear_frames(error.__traceback__)
            ranks = error.ranks if isinstance(error, MemberLeft) else ()
            waited_s = time.monotonic() - started_s
            raise StageFailed(name, waited_s, describe_error(error), ranks) from error

    # --- messages -------------------------------------------------------------------------------

    def announce(self, manifest: bytes, lost: Collection[int]) -> None:
        """Sender: sends the manifest and waits for all verdicts. Raises WeightSyncError for a
        refusal. A lost member is detected here, while all others still have their old weights: at
        the deadline, or when `lost` has its rank."""
        with self.stage("manifest"):
            self._messages.set("manifest", self._num_transfers, value=manifest)
            if self._num_transfers:  # all members have read the messages of the previous transfer
                self._messages.delete("manifest", self._num_transfers - 1)
                self._messages.delete_gathered("verdict", self._num_transfers - 1)
            verdicts = self._gather("verdict", "did not answer", lost)
        if refusals := {rank: text for rank, text in verdicts.items() if text}:
            reasons = "; ".join(f"rank {rank} refused: {text}" for rank, text in refusals.items())
            raise self.error(f"manifest: {reasons}", [*refusals])

    def receive_manifest(self) -> bytes:
        """Receiver: waits for the manifest."""
        with self.stage("manifest"):
            payload = self._messages.wait_for(
                "manifest",
                self._num_transfers,
                absence="the sender sent no manifest",
                timeout_s=self.offer.deadline_s,
            )
            if not payload:
                raise RuntimeError("the sender left the group")
            return payload

    def answer(self, verdict: str) -> None:
        """Receiver: sends the reason of a refusal, or an empty verdict."""
        with self.stage("manifest"):
            self._messages.set("verdict", self._num_transfers, self.offer.rank, value=verdict)

    def complete(self) -> None:
        """Ends a transfer."""
        self._report_end("")
        self._num_transfers += 1

    # --- failures -------------------------------------------------------------------------------

    def leave(self, reason: str) -> None:
        """Reports why this member leaves the group, and frees the transport, which wakes the peers
        that wait for this member."""
        self._report_end(reason)
        self.free()

    def explain(self, failure: StageFailed) -> WeightSyncError:
        """The failure of a member that has left, with the peers that it waited for."""
        if self.offer.rank == 0:
            transfer = str(self._num_transfers)
            lost = self._messages.ranks_without(transfer, "ended", timeout_s=GRACE_S)
            suffix = f"; no response from {name_ranks(lost)}" if lost else ""
            # The ranks of the failure are certain, the unresponsive ones are likely.
            return self.error(f"{failure}{suffix}", failure.missing_ranks or lost)
        where = f"waiting for rank 0 at {self.offer.store_host}:{self.offer.store_port}"
        return self.error(f"{failure}, {where}{self._reason_of_sender()}")

    def error(self, text: str, missing_ranks: Sequence[int] = ()) -> WeightSyncError:
        version, epoch = self.offer.policy_version, self.offer.epoch
        return WeightSyncError(
            f"policy version {version}, epoch {epoch}, {text}", missing_ranks=missing_ranks
        )

    def free(self, timeout_s: float = 0.0) -> None:
        """Frees the transport in a daemon thread, and waits at most `timeout_s` for it."""
        transport, self._transport = self._transport, None
        if transport is not None:
            thread = threading.Thread(target=transport.abort, daemon=True)
            thread.start()
            thread.join(timeout_s)

    def _report_end(self, failure: str) -> None:
        """A receiver reports that it has ended the transfer; a sender only reports a failure, also
        to receivers that wait for its next message."""
        transfer = self._num_transfers
        if self._store is None or self._stuck:
            return
        with suppress(RuntimeError):
            if self.offer.rank:
                self._store.set("ended", self.offer.rank, value=str(transfer))
            elif failure:
                for each in ("over", "go"):
                    self._store.set(each, value=failure[:MAX_REASON])
                for each in (transfer, transfer + 1):
                    self._store.set("manifest", each, value="")

    def _reason_of_sender(self) -> str:
        """Receiver: the sender's reason for the end of this epoch, if any."""
        if self._store is None or self._stuck:
            return ""
        try:
            over = self._store.wait_for("over", absence="no reason", timeout_s=GRACE_S)
        except (RuntimeError, TimeoutError):
            return ""
        return f"; it reported: {over.decode(errors='replace')}"

    def _has_sender_left(self) -> bool:
        """Receiver: whether the sender has reported a failure of this epoch."""
        if self.offer.rank == 0:
            return False
        return run_bounded(lambda: self._messages.has("over"), self.offer.deadline_s)

    # --- rendezvous -----------------------------------------------------------------------------

    def _await_receivers(self, lost: Collection[int]) -> None:
        joined = self._gather("joined", "never joined", lost)
        parts = {rank: value.partition("\n") for rank, value in joined.items()}
        identities = {rank: part[0] for rank, part in parts.items()}
        if faults := self._faults({0: self._identity(), **identities}):
            reasons = "; ".join(f"rank {rank} {text}" for rank, text in faults.items())
            raise self.error(f"rendezvous: {reasons}", [*faults])
        try:
            self.cast = agreed_dtypes(
                {rank: decode_dtypes(part[2]) for rank, part in parts.items()}
            )
        except WeightSyncError as error:
            raise self.error(f"rendezvous: {error}", error.missing_ranks) from None
        self._messages.set("go", value="")

    def _await_sender(self, expected: Sequence[NamedTensor]) -> None:
        stated = encode_dtypes(float_dtypes(expected))
        self._messages.set("joined", 0, self.offer.rank, value=f"{self._identity()}\n{stated}")
        refusal = self._messages.wait_for(
            "go",
            absence="the sender did not start this epoch",
            timeout_s=self.offer.deadline_s,
        )
        if refusal:
            reason = refusal.decode(errors="replace")
            raise self.error(f"rendezvous: the sender reported: {reason}")

    def _identity(self) -> str:
        """The machine (ipc) or the GPU (nccl) of this member. Raises ConfigError."""
        match self.offer.backend:
            case "ipc":
                return machine_identity()
            case "nccl":
                return gpu_identity(self._device)
            case _:
                return ""

    def _faults(self, identities: Mapping[int, str]) -> dict[int, str]:
        """Why members cannot take part, by rank. `identities`: of all members, by rank."""
        match self.offer.backend:
            case "ipc":
                return machine_mismatches(identities)
            case "nccl":
                return gpu_conflicts(identities)
            case _:
                return {}

    def _connect(self, store: Store) -> GroupTransport | IpcTransport:
        if self.offer.backend != "ipc":
            group = make_group(store, self.offer, self._device, self._has_sender_left)
            return GroupTransport(group, self.offer, self._device, self._has_sender_left)
        connect = join_sockets if self.offer.rank else host_sockets
        return IpcTransport(connect(store, self.offer), self.offer, self._device)

    def _gather(self, message: str, absence: str, lost: Collection[int]) -> dict[int, str]:
        """Sender: the message of every receiver for this transfer, by rank. Raises MemberLeft."""
        return self._messages.gather(
            message,
            self._num_transfers,
            absence=absence,
            timeout_s=self.offer.deadline_s,
            lost=lost,
        )
