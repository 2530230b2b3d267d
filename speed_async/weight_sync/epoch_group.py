"""The weight group of one epoch: rendezvous, messages, and the deadline of every stage.

Every message is a key in the sender's store: `epoch-3/verdict/0/2` is the verdict of rank 2 on the
manifest of the first transfer of epoch 3. The buckets are sent by the transport of the backend.

torch's store and process groups can block longer than their timeouts: a store whose host process is
stopped never responds to a cancelled wait, and destructors join their threads. Such calls run in
daemon threads, which are abandoned when they are late. To set a key, and to use the store in the
sender's own process, never blocks.
"""

import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import Bucket, Views, plan_buckets
from speed_async.weight_sync.channel import NamedTensor
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
    machine_mismatch,
)
from speed_async.weight_sync.manifest import KnownTensors, Manifest
from speed_async.weight_sync.process_group import (
    GroupTransport,
    MemberLeft,
    await_keys,
    describe_error,
    make_group,
    name_ranks,
    reach_store,
)

T = TypeVar("T")

SLACK_S = 0.25
"""Margin after torch's own timeout before a call is considered stuck."""
GRACE_S = 0.5
"""Time after a failure that peers have to report their state."""
POLL_S = 0.01
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
        self._store: Any = None  # a Store, from the rendezvous on
        self._transport: GroupTransport | IpcTransport | None = None
        self._stuck = False

    @property
    def transport(self) -> GroupTransport | IpcTransport:
        assert self._transport is not None, "the group is not formed"
        return self._transport

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
            if store is not None:
                self._store = store
                self._await_receivers(lost)
            else:
                self._store = self._run(lambda: reach_store(self.offer))
                self._await_sender(expected)
            prefixed = PrefixStore(self._key("group"), self._store)
            self._transport = self._run(lambda: self._connect(prefixed))

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
            self._store.set(self._key("manifest", self._num_transfers), manifest)
            if self._num_transfers:  # all members have read the messages of the previous transfer
                previous = self._num_transfers - 1
                read = self._receiver_keys("verdict", previous).values()
                for key in (self._key("manifest", previous), *read):
                    self._store.delete_key(key)
            verdicts = self._gather("verdict", "did not answer", lost)
        if refusals := {rank: text for rank, text in verdicts.items() if text}:
            reasons = "; ".join(f"rank {rank} refused: {text}" for rank, text in refusals.items())
            raise self.error(f"manifest: {reasons}", [*refusals])

    def receive_manifest(self) -> bytes:
        """Receiver: waits for the manifest."""
        key = self._key("manifest", self._num_transfers)
        with self.stage("manifest"):
            payload = self._wait_for(key, "the sender sent no manifest")
            if not payload:
                raise RuntimeError("the sender left the group")
            return payload

    def answer(self, verdict: str) -> None:
        """Receiver: sends the reason of a refusal, or an empty verdict."""
        with self.stage("manifest"):
            key = self._key("verdict", self._num_transfers, self.offer.rank)
            self._store.set(key, verdict)

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
            lost = self._unresponsive_ranks()
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
        messages = {}
        if self.offer.rank:
            messages = {self._key("ended", self.offer.rank): str(transfer)}
        elif failure:
            messages = dict.fromkeys(map(self._key, ("over", "go")), failure[:MAX_REASON])
            messages |= {self._key("manifest", each): "" for each in (transfer, transfer + 1)}
        if self._store is not None and not self._stuck:
            with suppress(RuntimeError):
                for key, value in messages.items():
                    self._store.set(key, value)

    def _unresponsive_ranks(self) -> list[int]:
        """Sender: receivers that have not ended the transfer within GRACE_S."""
        ended = str(self._num_transfers).encode()
        waiting = self._receiver_keys("ended")
        end_s = time.monotonic() + GRACE_S
        while waiting and time.monotonic() < end_s:
            for rank, key in [*waiting.items()]:
                if self._store.check([key]) and self._store.get(key) == ended:
                    del waiting[rank]
            time.sleep(POLL_S)
        return [*waiting]

    def _reason_of_sender(self) -> str:
        """Receiver: the sender's reason for the end of this epoch, if any."""
        if self._store is None or self._stuck:
            return ""
        try:
            over = self._wait_for(self._key("over"), "no reason", GRACE_S)
        except (RuntimeError, TimeoutError):
            return ""
        return f"; it reported: {over.decode(errors='replace')}"

    def _has_sender_left(self) -> bool:
        """Receiver: whether the sender has reported a failure of this epoch."""
        if self.offer.rank == 0:
            return False
        return self._run(lambda: self._store.check([self._key("over")]))

    # --- rendezvous -----------------------------------------------------------------------------

    def _await_receivers(self, lost: Collection[int]) -> None:
        joined = self._gather("joined", "never joined", lost)
        parts = {rank: value.partition("\n") for rank, value in joined.items()}
        if self.offer.backend == "ipc":
            ours = machine_identity()
            problems = {rank: machine_mismatch(ours, part[0]) for rank, part in parts.items()}
            if remote := [f"rank {rank} {text}" for rank, text in problems.items() if text]:
                raise self.error(f"rendezvous: {'; '.join(remote)}")
        try:
            self.cast = agreed_dtypes(
                {rank: decode_dtypes(part[2]) for rank, part in parts.items()}
            )
        except WeightSyncError as error:
            raise self.error(f"rendezvous: {error}", error.missing_ranks) from None
        self._store.set(self._key("go"), "")

    def _await_sender(self, expected: Sequence[NamedTensor]) -> None:
        identity = machine_identity() if self.offer.backend == "ipc" else ""
        stated = encode_dtypes(float_dtypes(expected))
        self._store.set(self._key("joined", 0, self.offer.rank), f"{identity}\n{stated}")
        refusal = self._wait_for(self._key("go"), "the sender did not start this epoch")
        if refusal:
            reason = refusal.decode(errors="replace")
            raise self.error(f"rendezvous: the sender reported: {reason}")

    def _connect(self, store: Store) -> GroupTransport | IpcTransport:
        if self.offer.backend != "ipc":
            group = make_group(store, self.offer, self._device, self._has_sender_left)
            return GroupTransport(group, self.offer, self._device, self._has_sender_left)
        connect = join_sockets if self.offer.rank else host_sockets
        return IpcTransport(connect(store, self.offer), self.offer, self._device)

    # --- store ----------------------------------------------------------------------------------

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (f"epoch-{self.offer.epoch}", *parts)))

    def _receiver_keys(self, *parts: object) -> dict[int, str]:
        return {rank: self._key(*parts, rank) for rank in range(1, self.offer.world_size)}

    def _gather(self, message: str, absence: str, lost: Collection[int]) -> dict[int, str]:
        """Sender: one value from every receiver, by rank. Raises MemberLeft."""
        keys = self._receiver_keys(message, self._num_transfers)
        if missing := await_keys(self._store, keys, self.offer.deadline_s, lost):
            raise MemberLeft(missing, absence)
        values = self._store.multi_get([*keys.values()])
        return {
            rank: value.decode(errors="replace") for rank, value in zip(keys, values, strict=True)
        }

    def _wait_for(self, key: str, absence: str, timeout_s: float | None = None) -> bytes:
        """Receiver: a value that the sender sets."""
        store, timeout_s = self._store, timeout_s or self.offer.deadline_s

        def get() -> bytes:
            store.set_timeout(timedelta(seconds=timeout_s))
            try:
                return store.get(key)
            except DistStoreError as error:
                raise RuntimeError(absence) from error

        return self._run(get, timeout_s)

    def _run(self, call: Callable[[], T], timeout_s: float | None = None) -> T:
        """Result of a call that may block, in a daemon thread. Raises TimeoutError when it is
        stuck."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:  # task boundary: the caller that waits handles the error
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future.result((timeout_s or self.offer.deadline_s) + SLACK_S)
