"""The messages of one epoch, and calls that may block.

Every message is a key in the sender's store: `epoch-3/verdict/0/2` is the verdict of rank 2 on the
manifest of the first transfer of epoch 3.

torch's store and process groups can block longer than their timeouts: a store whose host process is
stopped never responds to a cancelled wait, and destructors join their threads. Such calls run in
daemon threads, which are abandoned when they are late. To set a key, and to use the store in the
sender's own process, never blocks.
"""

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar, cast

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

from speed_async.weight_sync.process_group import MemberLeft, await_keys

T = TypeVar("T")

SLACK_S = 0.25
"""Margin after torch's own timeout before a call is considered stuck."""
POLL_S = 0.01


def run_bounded(call: Callable[[], T], timeout_s: float) -> T:
    """Result of a call that may block, in a daemon thread. Raises TimeoutError when it is stuck."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # task boundary: the caller that waits handles the error
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout_s + SLACK_S)


class EpochStore:
    """Sets and awaits the keys of one epoch. `parts` are the components of a key."""

    def __init__(self, store: Store, *, epoch: int, world_size: int) -> None:
        self._store = store
        self._epoch = epoch
        self._world_size = world_size

    def set(self, *parts: object, value: str | bytes) -> None:
        self._store.set(self._key(*parts), cast(str, value))  # its stub omits bytes

    def has(self, *parts: object) -> bool:
        return self._store.check([self._key(*parts)])

    def delete(self, *parts: object) -> None:
        self._store.delete_key(self._key(*parts))

    def delete_gathered(self, *parts: object) -> None:
        """Sender: deletes the values that `gather` has returned."""
        for key in self._receiver_keys(*parts).values():
            self._store.delete_key(key)

    def part(self, name: str) -> PrefixStore:
        """A store of its own for the transport."""
        return PrefixStore(self._key(name), self._store)

    def gather(
        self, *parts: object, absence: str, timeout_s: float, lost: Collection[int]
    ) -> dict[int, str]:
        """Sender: one value from every receiver, by rank. Raises MemberLeft at the timeout, or when
        a receiver without a value is `lost`."""
        keys = self._receiver_keys(*parts)
        if missing := await_keys(self._store, keys, timeout_s, lost):
            raise MemberLeft(missing, absence)
        values = self._store.multi_get([*keys.values()])
        return {
            rank: value.decode(errors="replace") for rank, value in zip(keys, values, strict=True)
        }

    def ranks_without(self, value: str, *parts: object, timeout_s: float) -> list[int]:
        """Sender: receivers that have not set this value within the timeout."""
        waiting = self._receiver_keys(*parts)
        end_s = time.monotonic() + timeout_s
        while waiting and time.monotonic() < end_s:
            for rank, key in [*waiting.items()]:
                if self._store.check([key]) and self._store.get(key) == value.encode():
                    del waiting[rank]
            time.sleep(POLL_S)
        return [*waiting]

    def wait_for(self, *parts: object, absence: str, timeout_s: float) -> bytes:
        """Receiver: a value that the sender sets. Raises RuntimeError with `absence` at the
        timeout, and TimeoutError if the store does not respond."""

        def get() -> bytes:
            self._store.set_timeout(timedelta(seconds=timeout_s))
            try:
                return self._store.get(self._key(*parts))
            except DistStoreError as error:
                raise RuntimeError(absence) from error

        return run_bounded(get, timeout_s)

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (f"epoch-{self._epoch}", *parts)))

    def _receiver_keys(self, *parts: object) -> dict[int, str]:
        return {rank: self._key(*parts, rank) for rank in range(1, self._world_size)}
