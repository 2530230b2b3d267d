"""The service's shell: sockets, disk, sinks and time around the machine.

consumes   the hub's messages, as many as are there, at once
waits for  the next message or the next tick; the disk, where an answer promises that it has it
ends       when the core has said everything and it was heard, or when it is cancelled

The order that nothing may change: an input is in the journal before anything that follows from it
leaves this process.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from speed_async.buffer.journal import SEGMENT_BYTES
from speed_async.buffer.machine import Machine
from speed_async.buffer.recovery import begin_segment
from speed_async.buffer.stored import StoredGroup
from speed_async.errors import DeadlineExceeded, JournalError
from speed_async.observe.metrics import Event
from speed_async.observe.sinks import Sink
from speed_async.wire import messages as m
from speed_async.wire.codec import decode
from speed_async.wire.feed import FeedPublisher
from speed_async.wire.groups import batch_group
from speed_async.wire.transport import Delivery, Hub

KEPT_KINDS = ("step", "evaluation", "end")
"""Status events are for the live feed only."""
BATCH_MESSAGES = 64
BATCH_BYTES = 16 * 1024 * 1024
"""Messages taken in before what they led to is sent: the journal is written once for them all."""
INLINE_BYTES = 1024 * 1024
"""Smaller writes are not worth another thread."""
SNAPSHOT_BYTES = 4 * 1024 * 1024
"""A journal shorter than this is read again faster than a snapshot pays."""
SYNC_INTERVAL_S = 1.0
FULL_RETRY_S = 0.005
"""A peer's queue that is full is looked at again this soon, for as long as PATIENCE_S."""
PATIENCE_S = 1.0
ROOM_RETRY_S = 0.5
LINGER_S = 2.0


async def serve(
    machine: Machine,
    hub: Hub,
    feed: FeedPublisher,
    sinks: Sequence[Sink],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until the service has ended; closes the hub, the feed, the sinks and the journal.

    Raises JournalError when the disk stays full for cluster.stall_timeout_s.
    """
    shell = _Shell(machine, hub, feed, sinks, clock)
    syncing = asyncio.create_task(shell.keep_synced(), name="sync")
    try:
        while not machine.service.ended:
            await shell.step()
        await shell.linger()
    finally:
        syncing.cancel()
        with suppress(asyncio.CancelledError):
            await syncing
        await hub.close()
        await feed.close()
        for sink in sinks:
            sink.close()
        if machine.journal is not None:
            machine.journal.close()


class _Shell:
    def __init__(
        self,
        machine: Machine,
        hub: Hub,
        feed: FeedPublisher,
        sinks: Sequence[Sink],
        clock: Callable[[], float],
    ) -> None:
        self._machine = machine
        self._hub = hub
        self._feed = feed
        self._sinks = sinks
        self._clock = clock
        self._config = machine.service.config
        # The machine's time goes on where its last input was, however long it was dead.
        self._behind_s = clock() - machine.last_s if machine.last_s else 0.0
        self._interval_s = self._config.observe.status_interval_s
        self._next_tick_s = self._now() + self._interval_s
        self._unsent: dict[str, float] = {}  # peers to be told more, and since when they are full
        self._spoke: set[str] = set()
        self._disk = asyncio.Lock()
        self._next_snapshot_s = 0.0

    def _now(self) -> float:
        return self._clock() - self._behind_s

    async def step(self) -> None:
        """Take in what is there, make it safe, say what follows."""
        await self._take_in()
        now_s = self._now()
        if now_s >= self._next_tick_s:
            self._machine.tick(now_s, now_s - self._next_tick_s)
            self._next_tick_s = self._now() + self._interval_s
            for peer, probe in self._machine.conversations.probes(now_s):
                self._offer(peer, probe)
        await self._make_safe()
        self._send_all()
        self._mute()
        await self._publish()
        await self._maybe_snapshot()

    async def linger(self) -> None:
        """Everything was said: wait a moment until everybody has heard it.

        What peers say is not taken in any more, and so not heard either: another life of the run
        must not lack what this one said to have.
        """
        ends_s = self._now() + LINGER_S
        conversations, service = self._machine.conversations, self._machine.service
        await self._make_safe()
        peers = [*service.membership.actors, service.membership.learner or ""]
        while any(map(conversations.num_unheard, peers)) and (left_s := ends_s - self._now()) > 0:
            self._send_all()
            try:
                peer, message = await self._hub.receive(min(left_s, 0.1))
            except DeadlineExceeded:
                continue
            if conversations.admit(peer, message, self._now()):
                conversations.overheard(peer, message)
        self._send_all()

    # --- in ------------------------------------------------------------------------------------

    async def _take_in(self) -> None:
        """The next message, and those that wait behind it."""
        now_s = self._now()
        wait_s = max(0.0, self._next_tick_s - now_s)
        if any(now_s - since_s < PATIENCE_S for since_s in self._unsent.values()):
            wait_s = min(wait_s, FULL_RETRY_S)
        try:
            received = await self._hub.receive(wait_s)
        except DeadlineExceeded:
            return
        machine, count = self._machine, 0
        while received is not None:
            peer, message = received
            machine.message(peer, message, self._now())
            self._spoke.add(peer)
            if machine.conversations.has_unsent(peer):
                self._unsent.setdefault(peer, self._now())
            count += 1
            pending = machine.journal.pending_bytes if machine.journal is not None else 0
            if count == BATCH_MESSAGES or pending > BATCH_BYTES or machine.service.ended:
                return
            received = self._hub.receive_now()

    def _mute(self) -> None:
        """Whoever was refused was told why just now."""
        guard = self._machine.service.gatekeeper
        while guard.to_mute:
            self._hub.mute(guard.to_mute.pop())
        guard.num_malformed, guard.num_muted = self._hub.rejected, self._hub.muted.num_muted

    # --- disk ----------------------------------------------------------------------------------

    async def _make_safe(self) -> None:
        """Nothing that follows from an input may leave before this returns."""
        journal = self._machine.journal
        if journal is None:
            self._machine.needs_sync = False
            return
        every = self._config.buffer.durability == "every" and journal.pending_bytes > 0
        async with self._disk:
            if journal.pending_bytes > INLINE_BYTES:
                await self._with_room(lambda: asyncio.to_thread(journal.write))
            elif journal.pending_bytes:
                await self._with_room(lambda: _done(journal.write))
            if every or self._machine.needs_sync:
                await self._with_room(lambda: asyncio.to_thread(journal.sync))
                self._machine.needs_sync = False

    async def _with_room(self, write: Callable[[], object]) -> None:
        """Try until the disk takes it. Meanwhile nothing is answered, so nobody goes on; and no
        time passes for the machine, so nobody is taken for dead."""
        began_s = self._clock()
        while True:
            try:
                await write()  # type: ignore[misc]
                break
            except OSError as error:
                waited_s = self._clock() - began_s
                if waited_s > self._config.cluster.stall_timeout_s:
                    raise JournalError(
                        f"the journal in '{self._config.run.folder}' could not be written for "
                        f"{waited_s:.0f} s ({error}): make room, then resume the run"
                    ) from error
                text = f"the journal cannot be written ({error.strerror}): the run waits for room"
                if self._machine.service.warning != text:
                    sys.stderr.write(text + "\n")
                self._machine.service.warning = text
                await self._feed.publish(self._machine.service.present_status(self._now()))
                await asyncio.sleep(ROOM_RETRY_S)
        waited_s = self._clock() - began_s
        if waited_s > ROOM_RETRY_S:
            self._behind_s += waited_s

    async def keep_synced(self) -> None:
        """What a power cut may cost, with `batched`: about one second."""
        synced = -1
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            journal = self._machine.journal
            if journal is not None and journal.sequence != synced:
                synced = journal.sequence
                with suppress(OSError):  # the next write will say it
                    await asyncio.to_thread(journal.syncer())

    async def _maybe_snapshot(self) -> None:
        machine, journal = self._machine, self._machine.journal
        if journal is None or self._now() < self._next_snapshot_s:
            return
        wanted = SNAPSHOT_BYTES if machine.service.snapshot_due else SEGMENT_BYTES
        if journal.num_bytes < wanted:
            return
        machine.service.snapshot_due = False
        async with self._disk:
            try:
                journal.write()
                fresh = begin_segment(journal.folder, machine, journal.segment + 1)
            except OSError:
                machine.service.snapshot_due = True
                self._next_snapshot_s = self._now() + 10.0
                return
            machine.journal = fresh
            journal.close()
            needed = machine.service.lifecycle.needed_segments
            fresh.drop(needed | {journal.segment})

    # --- out -----------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Say what there is room for."""
        conversations = self._machine.conversations
        replies, conversations.replies = conversations.replies, []
        for peer, reply in replies:
            self._hub.offer(peer, reply)
        unsent, conversations.unsent = conversations.unsent, []
        for peer in unsent:
            self._unsent.setdefault(peer, self._now())
        for peer in list(self._unsent):
            self._send_to(peer)
        spoke, self._spoke = self._spoke, set()
        for peer, word in conversations.words(spoke):
            self._hub.offer(peer, word)

    def _send_to(self, peer: str) -> None:
        conversations = self._machine.conversations
        while (message := conversations.next_unsent(peer)) is not None:
            delivery = self._offer(peer, self._loaded(message))
            if delivery is not Delivery.QUEUED:
                if delivery is Delivery.GONE:
                    del self._unsent[peer]
                return
            conversations.queued_one(peer)
            self._unsent[peer] = self._now()
        self._unsent.pop(peer, None)

    def _offer(self, peer: str, message: m.Message) -> Delivery:
        delivery = self._hub.offer(peer, message)
        if delivery is Delivery.GONE:
            self._machine.gone(peer, self._now())
        return delivery

    def _loaded(self, message: m.Message) -> m.Message:
        """Itself, or the group that it stands for, from memory or from the journal."""
        if not isinstance(message, StoredGroup):
            return message
        held = self._machine.service.lifecycle.in_training.get(message.lease_id)
        group = held.message if held is not None else None
        if group is None:
            assert self._machine.journal is not None
            stored = decode(self._machine.journal.read(message.place).frames)
            assert isinstance(stored, m.GroupFinished)
            group = stored
        return replace(batch_group(group), number=message.number, heard=message.heard)

    async def _publish(self) -> None:
        events, self._machine.events = self._machine.events, []
        for event in events:
            await self._feed.publish(event)
            self._keep(event)

    def _keep(self, event: Event) -> None:
        if event.kind not in KEPT_KINDS:
            return
        for sink in self._sinks:
            try:
                sink.write(event)
            except OSError as error:
                self._machine.service.warning = f"metrics could not be written: {error}"


async def _done(operation: Callable[[], None]) -> None:
    operation()
