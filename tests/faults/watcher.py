"""Observes the state of a run through its metrics feed, in a subscriber thread."""

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
    """Follows the feed on a fixed port through restarts of the service, until closed."""

    def __init__(self, port: int) -> None:
        self.newest_version = 0
        """Highest policy version reported so far."""
        self.warnings: list[str] = []
        """Each warning once, in order of appearance."""
        self._port = port
        self._events: list[tuple[float, Event]] = []
        self._changed = threading.Condition()
        self._stopped = threading.Event()
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
        self._stopped.set()
        self._thread.join(10.0)

    def latest(self) -> Event | None:
        with self._changed:
            return self._events[-1][1] if self._events else None

    def wait(self, condition: Callable[[Event], bool], since_s: float, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for an event received after `since_s` (monotonic) that fulfils the
        condition. Returns whether there was one."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(at >= since_s and condition(event) for at, event in self._events),
                timeout_s,
            )

    def clear_events(self) -> None:
        """Drop all events except the latest, so that memory stays bounded over hours."""
        with self._changed:
            del self._events[:-1]

    def _main(self) -> None:
        asyncio.run(self._follow())

    async def _follow(self) -> None:
        feed = FeedSubscriber("127.0.0.1", self._port)
        try:
            while not self._stopped.is_set():
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
