"""A daemon thread for calls that may block forever. A stuck thread is abandoned."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class SingleThreadExecutor:
    """Runs calls sequentially in a daemon thread. `stop` never waits."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def stop(self) -> None:
        self._calls.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except Exception as error:  # task boundary: the caller that waits handles the error
                # The frames keep the process group alive, which must be freed to wake its members.
                traceback.clear_frames(error.__traceback__)
                future.set_exception(error)
            del item, call, future  # otherwise they keep the last buffer alive until the next call
