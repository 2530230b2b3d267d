"""The weight group of one epoch: store, process group, and the deadline of every stage.

torch's store and process groups can block longer than their timeouts: a store whose host process is
stopped never responds to a cancelled wait, and destructors join their threads. One daemon thread
therefore owns the store and the group, and callers only wait on futures.

Shape legend: B bytes of one bucket or message.
"""

import re
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

from speed_async.types import WeightOffer
from speed_async.weight_sync.buckets import Bucket, plan_buckets
from speed_async.weight_sync.executor import SingleThreadExecutor
from speed_async.weight_sync.ipc_group import IpcGroup
from speed_async.weight_sync.manifest import Agreement, Manifest
from speed_async.weight_sync.process_group import broadcast_from_sender, make_group

T = TypeVar("T")

SLACK_S = 0.25
"""Margin after torch's own timeout before the thread is considered stuck."""
MAX_REASON = 1000
MAX_ERROR_LENGTH = 200
CLOSED = re.compile(r"closed by peer|reset by peer|Broken pipe", re.IGNORECASE)
CPP_LOCATION = re.compile(r"\[\S+\.(?:cc|cpp|cu|h|hpp):\d+\]")
"""Source location in a C++ error: `[/__w/.../pair.cc:553]`."""


class StageFailed(Exception):
    """A stage of a transfer failed. The sender and the receiver add the peers they waited for."""

    def __init__(
        self, stage: str, waited_s: float, reason: str, missing_ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(f"{stage} failed after {waited_s:.1f} s ({reason})")
        self.missing_ranks = tuple(missing_ranks)


class MemberLeft(RuntimeError):
    """These ranks did not respond within the deadline."""

    def __init__(self, ranks: Sequence[int], absence: str) -> None:
        super().__init__(f"{name_ranks(ranks)} {absence}")
        self.ranks = tuple(ranks)


class EpochGroup:
    """The store and the process group of one epoch, with the deadline of every stage."""

    def __init__(self, offer: WeightOffer, device: torch.device) -> None:
        self.offer = offer
        self.formed = False
        self.stuck = False
        self.num_transfers = 0
        self.agreed: Agreement | None = None
        self._plan: tuple[Manifest, tuple[Bucket, ...]] | None = None
        self._announced = False
        self._broken = ""
        self._device = device
        self._store: Store | None = None  # the store and the group are used by the thread only
        self._group: Any = None
        self._executor = SingleThreadExecutor(f"weights-epoch-{offer.epoch}-rank-{offer.rank}")

    @property
    def receiver_ranks(self) -> range:
        return range(1, self.offer.world_size)

    @property
    def ipc(self) -> IpcGroup:
        """The members' sockets, once formed. Their calls respect deadlines and need no thread."""
        assert isinstance(self._group, IpcGroup)
        return self._group

    @property
    def last_plan(self) -> tuple[Bucket, ...]:
        """The buckets of the previous transfer; empty in the first transfer of an epoch."""
        return self._plan[1] if self._plan else ()

    def plan(self, manifest: Manifest) -> tuple[Bucket, ...]:
        """Buckets of these tensors. The result is the same object while the tensors and the bucket
        size are unchanged."""
        kept = self._plan
        if kept is None or (kept[0].tensors, kept[0].bucket_bytes) != (
            manifest.tensors,
            manifest.bucket_bytes,
        ):
            kept = manifest, plan_buckets(manifest.tensors, manifest.bucket_bytes)
            self._plan = kept
        return kept[1]

    def key(self, *parts: object) -> str:
        return "/".join(map(str, (f"epoch-{self.offer.epoch}", *parts)))

    def connect(self, make_store: Callable[[], Store]) -> "Future[None]":
        def call() -> None:
            self._store = make_store()

        return self._executor.submit(call)

    def on_store(self, call: Callable[[Store], T]) -> "Future[T]":
        def with_store() -> T:
            if self._store is None:
                raise RuntimeError("the store is not connected")
            return call(self._store)

        return self._executor.submit(with_store)

    def build(self) -> "Future[None]":
        """Creates the process group; a collective call of all members."""

        def call(store: Store) -> None:
            prefixed = PrefixStore(self.key("group"), store)
            self._group = make_group(prefixed, self.offer, self._device)

        return self.on_store(call)

    def broadcast(self, *buffers_B: Tensor) -> "list[Future[None]]":
        """Sends from rank 0, or receives into `buffers_B`, (B,) uint8 each. Returns one future per
        buffer.

        Empty buffers are not transferred. With ipc, the call is synchronous, because later calls
        use the same sockets from the calling thread.
        """
        futures: list[Future[None]] = [Future() for _ in buffers_B]
        full = [index for index, buffer_B in enumerate(buffers_B) if buffer_B.numel()]

        def mark_done(index: int) -> None:
            futures[full[index]].set_result(None)

        def call() -> None:
            offer, transferred = self.offer, [buffers_B[index] for index in full]
            try:
                if self._broken:  # fail immediately instead of waiting for another timeout
                    raise RuntimeError(f"an earlier broadcast failed: {self._broken}")
                broadcast_from_sender(
                    self._group, transferred, offer.deadline_s, offer.backend, mark_done
                )
            except RuntimeError as error:
                self._broken = self._broken or describe_error(error)
                # The frames keep the process group alive, which must be freed to wake its members.
                traceback.clear_frames(error.__traceback__)
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

        for index in set(range(len(buffers_B))).difference(full):
            futures[index].set_result(None)
        if self.offer.backend == "ipc":
            call()
        else:
            self._executor.submit(call)
        return futures

    def to_transfer_device(self, message_B: Tensor) -> Tensor:
        """The message on the device that the backend uses."""
        return message_B.to(self._device) if self.offer.backend == "nccl" else message_B

    def wait(self, stage: str, future: "Future[T]", deadline_s: float | None = None) -> T:
        """Result of a call. Raises StageFailed when it fails or exceeds the deadline."""
        started_s = time.monotonic()
        try:
            return future.result((deadline_s or self.offer.deadline_s) + SLACK_S)
        except TimeoutError as error:
            self.stuck = True
            raise StageFailed(stage, time.monotonic() - started_s, "no response") from error
        except RuntimeError as error:  # torch.distributed raises it for all failures
            reason = describe_error(error)
            ranks = error.ranks if isinstance(error, MemberLeft) else ()
            raise StageFailed(stage, time.monotonic() - started_s, reason, ranks) from error

    def attempt(self, stage: str, call: Callable[[], T]) -> T:
        """Result of a call with its own deadline. Raises StageFailed when it fails."""
        started_s = time.monotonic()
        try:
            return call()
        except RuntimeError as error:
            raise StageFailed(stage, time.monotonic() - started_s, describe_error(error)) from error

    def announce_end(self, reason: str) -> None:
        """Reports, once, why this member leaves the group, and frees the process group.

        Freeing it closes its connections, which wakes the peers that wait for this member.
        """
        if self._announced:
            return
        self._announced = True
        keys = ("over", "go") if self.offer.rank == 0 else (f"left/{self.offer.rank}",)

        def call(store: Store) -> None:
            for key in keys:
                store.set(self.key(key), reason[:MAX_REASON])
            self._free_group()

        self.on_store(call)

    def drop(self) -> None:
        """Frees the group and the store in the thread, and stops it. Never waits."""

        def call() -> None:
            self._free_group()
            self._store = None

        self._executor.submit(call)
        self._executor.stop()

    def join(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` until a dropped group is freed."""
        self._executor.join(timeout_s)

    def _free_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def describe_error(error: BaseException) -> str:
    """First line of a backend's error message, without C++ source locations."""
    text = str(error).partition("\n")[0]
    if CLOSED.search(text):
        return "the connection was closed by the peer"
    text = CPP_LOCATION.sub("", text).strip()
    return text[:MAX_ERROR_LENGTH] or type(error).__name__


def wait_for_keys(store: Store, keys: Sequence[str], timeout_s: float) -> bool:
    """Whether all keys were set within the timeout. Raises RuntimeError when the store is
    unreachable."""
    try:
        store.wait(list(keys), timedelta(seconds=timeout_s))
    except DistStoreError:
        return False
    return True


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
