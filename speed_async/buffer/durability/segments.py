"""Segments of a running service's journal: written in a separate thread, synced and rotated.

The current segment is the machine's `journal`. Closed segments are kept here until they are on
disk; only then are segments removed that are no longer needed.
"""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from speed_async.buffer.durability.journal import SEGMENT_BYTES, Journal
from speed_async.buffer.durability.recovery import begin_segment
from speed_async.buffer.state_machine import StateMachine

SNAPSHOT_BYTES = 4 * 1024 * 1024
"""A shorter journal is replayed faster than a snapshot is taken."""
SNAPSHOT_RETRY_S = 10.0
SYNC_INTERVAL_S = 1.0


class Segments:
    """Segments of a machine that keeps a journal. Without a journal, only `keep_synced` and `close`
    are called."""

    def __init__(self, machine: StateMachine) -> None:
        self._machine = machine
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._next_snapshot_s = 0.0
        self._snapshot_due = False
        self._ended: list[Journal] = []  # segments before the current one, not yet synced
        self._needed: set[int] = set()
        self._syncing = threading.Lock()

    def start_writing(self, *, syncs: bool) -> "Future[None]":
        """Run `write` in another thread, after all earlier writes."""
        return self._writer.submit(self.write, syncs=syncs)

    def write(self, *, syncs: bool) -> None:
        """Write all appended records, and sync them to disk if `syncs`. Raises OSError."""
        journal = self._machine.journal
        assert journal is not None
        journal.write()
        if syncs:
            self._sync(journal)

    async def keep_synced(self) -> None:
        """Sync periodically. With `batched`, a power failure loses about one second."""
        synced = -1
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            journal = self._machine.journal
            if journal is not None and journal.sequence != synced:
                synced = journal.sequence
                with suppress(OSError):  # reported by the next write
                    await asyncio.to_thread(self._sync, journal)

    def request_snapshot(self) -> None:
        """A snapshot makes older records unnecessary."""
        self._snapshot_due = True

    def is_due(self, now_s: float) -> bool:
        """Whether a snapshot should start a new segment."""
        journal = self._machine.journal
        if journal is None or now_s < self._next_snapshot_s:
            return False
        return journal.num_bytes >= (SNAPSHOT_BYTES if self._snapshot_due else SEGMENT_BYTES)

    def begin(self, now_s: float) -> None:
        """Start a new segment with a snapshot of the current state. No write may be in progress.
        When the disk is full, the current segment continues."""
        machine, journal = self._machine, self._machine.journal
        assert journal is not None
        self._snapshot_due = False
        try:
            journal.write()
            fresh = begin_segment(journal.folder, machine, journal.segment + 1, journal.sequence)
        except OSError:
            self._snapshot_due = True
            self._next_snapshot_s = now_s + SNAPSHOT_RETRY_S
            return
        machine.journal = fresh
        self._ended.append(journal)
        # The set of needed segments only shrinks, and none is removed before the next `_sync`.
        self._needed = machine.service.lifecycle.groups.needed_segments | {journal.segment}

    async def close(self) -> None:
        """Close all segments once no other thread uses them."""
        await asyncio.to_thread(self._writer.shutdown)
        with self._syncing:
            for journal in (*self._ended, self._machine.journal):
                if journal is not None:
                    journal.close()

    def _sync(self, journal: Journal) -> None:
        """Sync earlier segments, then this one, then remove unneeded segments. Runs in another
        thread. Raises OSError."""
        with self._syncing:
            before = self._ended[:]
            for ended in before:
                ended.sync()
            journal.sync()
            for ended in before:
                ended.close()
            del self._ended[: len(before)]
        if before:
            journal.drop(self._needed)
