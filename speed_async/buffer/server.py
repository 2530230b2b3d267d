"""I/O around the state machine of the service: sockets, disk, sinks and time.

consumes   all messages that the hub holds, in batches
waits for  the next message or the next tick; the disk, before a reply that promises durability
ends       when the service has ended and all its messages are acknowledged, or on cancellation

Invariant: an input is in the journal before any of its effects leaves this process. During a long
write, the next inputs are processed already.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from speed_async.buffer.durability.segments import Segments
from speed_async.buffer.sender import Sender
from speed_async.buffer.sessions import Sealed
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.resumed import CONFIG_FILE
from speed_async.errors import DeadlineExceeded, JournalError
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import Sink
from speed_async.transport import messages as m
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.transport import Hub, PeerName

BATCH_MESSAGES = 64
BATCH_BYTES = 4 * 1024 * 1024
"""Bounds of an input batch: its messages share one journal write before their effects are sent."""
MAX_PENDING_BATCHES = 4
"""Input batches that may wait for the disk."""
INLINE_BYTES = 1024 * 1024
"""Smaller writes run in this thread."""
WRITE_POLL_S = 0.001
"""Timeout of each receive while a write is in progress."""
FULL_RETRY_S = 0.005
"""Retry interval while the queue of a peer is full."""
DISK_RETRY_S = 0.5
FINAL_ACK_TIMEOUT_S = 2.0


async def serve(
    machine: StateMachine,
    hub: Hub,
    feed: FeedPublisher,
    sinks: Sequence[Sink],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until the service has ended; closes the hub, the feed, the sinks and the journal.

    Raises JournalError if the journal cannot be written for cluster.stall_timeout_s.
    """
    segments = Segments(machine)
    server = _Server(machine, hub, feed, sinks, clock, segments)
    syncing = asyncio.create_task(segments.keep_synced(), name="sync")
    try:
        while not machine.service.ended:
            await server.step()
        await server.wait_for_acks()
    finally:
        syncing.cancel()
        with suppress(asyncio.CancelledError):
            await syncing
        await hub.close()
        await feed.close()
        for sink in sinks:
            sink.close()
        await segments.close()


@dataclass(kw_only=True)
class _InputBatch:
    """Inputs with one journal write, and the effects to publish after it."""

    sealed: Sealed
    senders: set[str]
    events: list[Event]
    syncs: bool
    writing: "Future[None] | None" = None


class _Server:
    def __init__(
        self,
        machine: StateMachine,
        hub: Hub,
        feed: FeedPublisher,
        sinks: Sequence[Sink],
        clock: Callable[[], float],
        segments: Segments,
    ) -> None:
        self._machine = machine
        self._hub = hub
        self._feed = feed
        self._sender = Sender(machine, hub, feed, sinks, self._now)
        self._clock = clock
        self._config = machine.service.config
        # After a restart, the machine's time continues at its last input.
        self._clock_offset_s = clock() - machine.last_s if machine.last_s else 0.0
        self._interval_s = self._config.observe.status_interval_s
        self._next_tick_s = self._now() + self._interval_s
        self._senders: set[str] = set()
        self._batches: deque[_InputBatch] = deque()  # processed; effects not published
        self._segments = segments
        self._folder_found = False
        machine.sessions.holding = machine.journal is not None

    def _now(self) -> float:
        return self._clock() - self._clock_offset_s

    async def step(self) -> None:
        """Receive the available inputs, journal them, and publish their effects."""
        await self._receive_inputs()
        now_s = self._now()
        while self._hub.newly_rejected:
            self._machine.refused(self._hub.newly_rejected.pop(), "malformed", now_s)
        if now_s >= self._next_tick_s:
            self._machine.tick(now_s, now_s - self._next_tick_s)
            self._check_folder()
            self._next_tick_s = self._now() + self._interval_s
            for peer, ping in self._machine.sessions.due_pings(now_s):
                self._sender.offer(peer, ping)
        batch, journal = self._collect_batch(), self._machine.journal
        if journal is not None and (
            self._batches or batch.syncs or journal.pending_bytes > INLINE_BYTES
        ):
            batch.writing = self._segments.start_writing(syncs=batch.syncs)
        self._batches.append(batch)
        while self._batches and (len(self._batches) > MAX_PENDING_BATCHES or not self._is_writing):
            await self._finish_batch()
        if self._segments.is_due(self._now()):
            await self._finish_batches()
            self._segments.begin(self._now())

    def _collect_batch(self) -> _InputBatch:
        machine, journal = self._machine, self._machine.journal
        every = self._config.buffer.durability == "every"
        output = machine.take_output()
        if output.snapshot_due:
            self._segments.request_snapshot()
        senders, self._senders = self._senders, set()
        batch = _InputBatch(
            sealed=machine.sessions.seal(),
            senders=senders,
            events=output.events,
            syncs=journal is not None
            and (output.needs_sync or (every and journal.pending_bytes > 0)),
        )
        return batch

    async def _finish_batch(self) -> None:
        """Wait until the first batch is in the journal, then publish its effects."""
        batch = self._batches[0]
        await self._wait_written(batch)
        self._batches.popleft()
        self._sender.send_effects(batch.sealed, batch.senders)
        self._block_refused()
        await self._sender.publish(batch.events)

    async def _finish_batches(self) -> None:
        while self._batches:
            await self._finish_batch()

    async def wait_for_acks(self) -> None:
        """Wait for up to FINAL_ACK_TIMEOUT_S until all peers have acknowledged all messages.

        Messages of peers are neither processed nor acknowledged any more: the journal for another
        attempt must hold every message that was acknowledged.
        """
        ends_s = self._now() + FINAL_ACK_TIMEOUT_S
        sessions, service = self._machine.sessions, self._machine.service
        await self._finish_batches()
        peers = [*service.membership.actors, service.membership.learner or ""]
        while any(map(sessions.num_unacked, peers)) and (left_s := ends_s - self._now()) > 0:
            self._sender.send_effects(sessions.seal(), set())
            try:
                peer, message = await self._hub.receive(min(left_s, 0.1))
            except DeadlineExceeded:
                continue
            if sessions.admit(peer, message, self._now()):
                sessions.record_ack(peer, message)
        self._sender.send_effects(sessions.seal(), set())

    # --- input ---------------------------------------------------------------------------------

    async def _receive_inputs(self) -> None:
        """Receive the next message and all queued messages. While a write is in progress, also
        receive the messages that arrive during it."""
        wait_s = WRITE_POLL_S if self._is_writing else self._max_wait_s()
        received = await self._next_message(wait_s)
        machine, count = self._machine, 0
        while received is not None or self._is_writing:
            if received is not None:
                peer, message = received
                machine.message(peer, message, self._now(), self._hub.key_of(peer))
                self._senders.add(peer)
                count += 1
                pending = machine.journal.pending_bytes if machine.journal is not None else 0
                if count == BATCH_MESSAGES or pending > BATCH_BYTES or machine.service.ended:
                    return
            received = self._hub.receive_now()
            if received is None and self._is_writing:
                received = await self._next_message(WRITE_POLL_S)

    async def _next_message(self, wait_s: float) -> tuple[PeerName, m.Message] | None:
        try:
            return await self._hub.receive(wait_s)
        except DeadlineExceeded:
            return None

    def _max_wait_s(self) -> float:
        now_s = self._now()
        wait_s = max(0.0, self._next_tick_s - now_s)
        if self._sender.retries_soon:
            return min(wait_s, FULL_RETRY_S)
        return wait_s

    @property
    def _is_writing(self) -> bool:
        """Whether the write of the first batch is in progress."""
        writing = self._batches[0].writing if self._batches else None
        return writing is not None and not writing.done()

    def _block_refused(self) -> None:
        """Block the refused peers, after their Rejected messages were sent."""
        validator = self._machine.service.validator
        while validator.to_block:
            self._hub.mute(validator.to_block.pop())
        validator.num_malformed = self._hub.rejected
        validator.num_blocked = self._hub.muted.num_blocked

    # --- disk ----------------------------------------------------------------------------------

    async def _wait_written(self, batch: _InputBatch) -> None:
        """Wait until a batch is on disk. Until then the service sends no reply, so its peers wait,
        and the clock of the machine stops, so no peer times out."""
        if self._machine.journal is None:
            return
        began_s = self._clock()
        while True:
            try:
                if batch.writing is None:
                    self._segments.write(syncs=batch.syncs)
                else:
                    await asyncio.shield(asyncio.wrap_future(batch.writing))
                break
            except OSError as error:
                waited_s = self._clock() - began_s
                if waited_s > self._config.cluster.stall_timeout_s:
                    raise JournalError(
                        f"the journal in '{self._config.run.folder}' could not be written for "
                        f"{waited_s:.0f} s ({error}): free disk space, then resume the run"
                    ) from error
                text = f"the journal cannot be written ({error.strerror}): the run waits for space"
                if text not in self._machine.service.warning:
                    sys.stderr.write(text + "\n")
                self._machine.service.warnings.open("journal", text)
                await self._feed.publish(self._machine.service.present_status(self._now()))
                await asyncio.sleep(DISK_RETRY_S)
                for waiting in self._batches:
                    waiting.writing = self._segments.start_writing(syncs=waiting.syncs)
        self._machine.service.warnings.close("journal")
        waited_s = self._clock() - began_s
        if waited_s > DISK_RETRY_S:
            self._clock_offset_s += waited_s

    def _check_folder(self) -> None:
        """Warn if the run folder was removed. Writes to open files still succeed then, so no other
        check detects it."""
        folder = Path(self._config.run.folder)
        found_before, self._folder_found = self._folder_found, (folder / CONFIG_FILE).exists()
        if found_before and not self._folder_found:
            text = (
                f"the run folder '{folder}' was removed or moved: this run's metrics and journal "
                "are lost and it cannot be resumed; stop it, or let it continue for its "
                "checkpoints"
            )
            self._machine.service.warnings.open("folder", text)
