"""How a run is doing, as its metrics feed tells it: a subscriber in a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from speed_async.errors import DeadlineExceeded
from speed_async.observability.metrics import Event
from speed_async.transport.feed import FeedSubscriber

POLL_S = 0.25


class Watcher:
    """Follows the feed at a fixed port, through restarts of the service, until left."""

    def __init__(self, port: int) -> None:
        self.newest_version = 0
        """Highest policy version ever told of."""
        self.warnings: list[str] = []
        """Each once, in the order in which they came up."""
        self._port = port
        self._events: list[tuple[float, Event]] = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(10.0)

    def latest(self) -> Event | None:
        with self._changed:
            return self._events[-1][1] if self._events else None

    def wait(self, happened: Callable[[Event], bool], since_s: float, timeout_s: float) -> bool:
        """Whether an event that came after `since_s` (monotonic) says that it has happened; waits
        up to `timeout_s` for one."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(at >= since_s and happened(event) for at, event in self._events),
                timeout_s,
            )

    def forget(self) -> None:
        """Of earlier events only the latest is kept: memory stays bounded over hours."""
        with self._changed:
            del self._events[:-1]

    def _main(self) -> None:
        asyncio.run(self._follow())

    async def _follow(self) -> None:
        feed = FeedSubscriber("127.0.0.1", self._port)
        try:
            while not self._over.is_set():
                with suppress(DeadlineExceeded):
                    self._take(await feed.receive(POLL_S))
        finally:
            await feed.close()

    def _take(self, event: Event) -> None:
        version, warning = event.values.get("policy_version"), event.values.get("warning")
        with self._changed:
            if isinstance(version, int):
                self.newest_version = max(self.newest_version, version)
            if warning and str(warning) not in self.warnings[-20:]:
                self.warnings.append(str(warning))
            self._events.append((time.monotonic(), event))
            self._changed.notify_all()
