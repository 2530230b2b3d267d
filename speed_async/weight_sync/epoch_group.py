"""One epoch's group of members: store, process group, and the deadline of every stage.

torch's store and process groups can block past every timeout they are given (a store whose host
process is stopped never answers a cancelled wait; destructors join their threads). So one daemon
thread, the lane, owns store and group, and whoever uses them only waits on futures.

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
"""Torch's own timeout is given this much to fire before its lane is taken for stuck."""
MAX_REASON = 1000
MAX_WORDS = 200
CLOSED = re.compile(r"closed by peer|reset by peer|Broken pipe", re.IGNORECASE)
CPP_PLACE = re.compile(r"\[\S+\.(?:cc|cpp|cu|h|hpp):\d+\]")
"""Where in its C++ an error arose: `[/__w/.../pair.cc:553]`."""


class StageFailed(Exception):
    """One stage of a transfer ended badly; sender and receiver add whom they waited for."""

    def __init__(
        self, stage: str, waited_s: float, reason: str, missing_ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(f"{stage} failed after {waited_s:.1f} s ({reason})")
        self.missing_ranks = tuple(missing_ranks)


class MemberLeft(RuntimeError):
    """These ranks gave no word within the deadline."""

    def __init__(self, ranks: Sequence[int], absence: str) -> None:
        super().__init__(f"{name_ranks(ranks)} {absence}")
        self.ranks = tuple(ranks)


class EpochGroup:
    """The members of one epoch: store, process group, and the deadline of every stage."""

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
        self._store: Store | None = None  # this and the group are touched by the lane alone
        self._group: Any = None
        self._lane = SingleThreadExecutor(f"weights-epoch-{offer.epoch}-rank-{offer.rank}")

    @property
    def receiver_ranks(self) -> range:
        return range(1, self.offer.world_size)

    @property
    def ipc(self) -> IpcGroup:
        """The members' sockets, once formed: their calls keep deadlines and need no lane."""
        assert isinstance(self._group, IpcGroup)
        return self._group

    @property
    def last_plan(self) -> tuple[Bucket, ...]:
        """The buckets of the transfer before this one; none in the first of an epoch."""
        return self._plan[1] if self._plan else ()

    def plan(self, manifest: Manifest) -> tuple[Bucket, ...]:
        """Buckets of these tensors; the very same ones while the manifest stays what it was."""
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

        return self._lane.submit(call)

    def on_store(self, call: Callable[[Store], T]) -> "Future[T]":
        def with_store() -> T:
            if self._store is None:
                raise RuntimeError("the store was not reached")
            return call(self._store)

        return self._lane.submit(with_store)

    def build(self) -> "Future[None]":
        """Make the process group; every member has to take part."""

        def call(store: Store) -> None:
            prefixed = PrefixStore(self.key("group"), store)
            self._group = make_group(prefixed, self.offer, self._device)

        return self.on_store(call)

    def broadcast(self, *buffers_B: Tensor) -> "list[Future[None]]":
        """Send from rank 0, or receive into `buffers_B`, (B,) uint8 each; a future for each.

        Empty ones do not travel. With ipc all is done when this returns: what follows uses the
        same sockets, from here.
        """
        futures: list[Future[None]] = [Future() for _ in buffers_B]
        full = [index for index, buffer_B in enumerate(buffers_B) if buffer_B.numel()]

        def moved(place: int) -> None:
            futures[full[place]].set_result(None)

        def call() -> None:
            offer, travelling = self.offer, [buffers_B[index] for index in full]
            try:
                if self._broken:  # the lane has better things to do than to wait once more
                    raise RuntimeError(f"an earlier broadcast failed: {self._broken}")
                broadcast_from_sender(
                    self._group, travelling, offer.deadline_s, offer.backend, moved
                )
            except RuntimeError as error:
                self._broken = self._broken or in_words(error)
                # The frames below hold the process group, which must be freed to wake its members.
                traceback.clear_frames(error.__traceback__)
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

        for index in set(range(len(buffers_B))).difference(full):
            futures[index].set_result(None)
        if self.offer.backend == "ipc":
            call()
        else:
            self._lane.submit(call)
        return futures

    def placed(self, message_B: Tensor) -> Tensor:
        """The message where the backend can take it from or put it."""
        return message_B.to(self._device) if self.offer.backend == "nccl" else message_B

    def wait(self, stage: str, future: "Future[T]", deadline_s: float | None = None) -> T:
        """Result of a call. Raises StageFailed when it fails or outlasts the deadline."""
        began_s = time.monotonic()
        try:
            return future.result((deadline_s or self.offer.deadline_s) + SLACK_S)
        except TimeoutError as error:
            self.stuck = True
            raise StageFailed(stage, time.monotonic() - began_s, "no answer") from error
        except RuntimeError as error:  # what torch.distributed raises for all its failures
            reason = in_words(error)
            ranks = error.ranks if isinstance(error, MemberLeft) else ()
            raise StageFailed(stage, time.monotonic() - began_s, reason, ranks) from error

    def attempt(self, stage: str, call: Callable[[], T]) -> T:
        """Result of a call that keeps its own deadline. Raises StageFailed when it fails."""
        began_s = time.monotonic()
        try:
            return call()
        except RuntimeError as error:
            raise StageFailed(stage, time.monotonic() - began_s, in_words(error)) from error

    def announce_end(self, reason: str) -> None:
        """Tell the others, once, why this member takes part no more; free the process group.

        Freeing it closes its connections, which wakes whoever waits for this member.
        """
        if self._announced:
            return
        self._announced = True
        words = ("over", "go") if self.offer.rank == 0 else (f"left/{self.offer.rank}",)

        def call(store: Store) -> None:
            for word in words:
                store.set(self.key(word), reason[:MAX_REASON])
            self._free_group()

        self.on_store(call)

    def drop(self) -> None:
        """Let the lane free group and store, and end. Never waits."""

        def call() -> None:
            self._free_group()
            self._store = None

        self._lane.submit(call)
        self._lane.stop()

    def join(self, timeout_s: float) -> None:
        """Wait for a dropped group to be gone, but no longer than `timeout_s`."""
        self._lane.join(timeout_s)

    def _free_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def in_words(error: BaseException) -> str:
    """What a backend's error says, without the places in its C++ and its guesses."""
    text = str(error).partition("\n")[0]
    if CLOSED.search(text):
        return "the connection was closed by the other side"
    text = CPP_PLACE.sub("", text).strip()
    return text[:MAX_WORDS] or type(error).__name__


def wait_for_keys(store: Store, keys: Sequence[str], timeout_s: float) -> bool:
    """Whether all keys were set in time. Raises RuntimeError when the store is gone."""
    try:
        store.wait(list(keys), timedelta(seconds=timeout_s))
    except DistStoreError:
        return False
    return True


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
