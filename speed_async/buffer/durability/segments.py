"""The journal of a service that runs: written in a thread of its own, synced, begun anew.

The segment at hand is the machine's `journal`; those that ended wait here until they are on the
disk, and only then may go what nobody needs any more.
"""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from speed_async.buffer.durability.journal import SEGMENT_BYTES, Journal
from speed_async.buffer.durability.recovery import begin_segment
from speed_async.buffer.state_machine import StateMachine

SNAPSHOT_BYTES = 4 * 1024 * 1024
"""A journal shorter than this is read again faster than a snapshot pays."""
SNAPSHOT_RETRY_S = 10.0
SYNC_INTERVAL_S = 1.0


class Segments:
    """Of a machine that keeps a journal; without one nothing here is called but `keep_synced` and
    `close`."""

    def __init__(self, machine: StateMachine) -> None:
        self._machine = machine
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._next_snapshot_s = 0.0
        self._ended: list[Journal] = []  # segments before the present one, not yet synced
        self._needed: set[int] = set()
        self._syncing = threading.Lock()

    def start_writing(self, *, syncs: bool) -> "Future[None]":
        """`write` in another thread, after whatever was started before."""
        return self._writer.submit(self.write, syncs=syncs)

    def write(self, *, syncs: bool) -> None:
        """All that was appended; `syncs`: and wait until the disk has it. Raises OSError."""
        journal = self._machine.journal
        assert journal is not None
        journal.write()
        if syncs:
            self._sync(journal)

    async def keep_synced(self) -> None:
        """What a power cut may cost, with `batched`: about one second."""
        synced = -1
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            journal = self._machine.journal
            if journal is not None and journal.sequence != synced:
                synced = journal.sequence
                with suppress(OSError):  # the next write will say it
                    await asyncio.to_thread(self._sync, journal)

    def is_due(self, now_s: float) -> bool:
        """Whether a snapshot should begin another segment."""
        journal = self._machine.journal
        if journal is None or now_s < self._next_snapshot_s:
            return False
        return journal.num_bytes >= (
            SNAPSHOT_BYTES if self._machine.service.snapshot_due else SEGMENT_BYTES
        )

    def begin(self, now_s: float) -> None:
        """Another segment, with all that came before in its snapshot; nothing may be in writing.
        Where the disk has no room, the present one goes on."""
        machine, journal = self._machine, self._machine.journal
        assert journal is not None
        machine.service.snapshot_due = False
        try:
            journal.write()
            fresh = begin_segment(journal.folder, machine, journal.segment + 1)
        except OSError:
            machine.service.snapshot_due = True
            self._next_snapshot_s = now_s + SNAPSHOT_RETRY_S
            return
        machine.journal = fresh
        self._ended.append(journal)
        # Later on none of these is needed that is not now, and none goes before the next `_sync`.
        self._needed = machine.service.lifecycle.needed_segments | {journal.segment}

    async def close(self) -> None:
        """Once nothing of it is in another thread's hands any more."""
        await asyncio.to_thread(self._writer.shutdown)
        with self._syncing:
            for journal in (*self._ended, self._machine.journal):
                if journal is not None:
                    journal.close()

    def _sync(self, journal: Journal) -> None:
        """First the segments before it, then this one; then what nobody needs may go. Runs in
        another thread. Raises OSError."""
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
