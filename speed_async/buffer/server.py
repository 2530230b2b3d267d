"""The service's shell: sockets, disk, sinks and time around the machine.

consumes   the hub's messages, as many as are there, at once
waits for  the next message or the next tick; the disk, where an answer promises that it has it
ends       when the core has said everything and it was heard, or when it is cancelled

The order that nothing may change: an input is in the journal before anything that follows from it
leaves this process. Where there is much to write, the next inputs are taken in meanwhile.
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

from speed_async.buffer.durability.journal import Place
from speed_async.buffer.durability.segments import Segments
from speed_async.buffer.durability.stored import StoredGroup
from speed_async.buffer.sessions import Sealed
from speed_async.buffer.state_machine import StateMachine
from speed_async.config.resumed import CONFIG_FILE
from speed_async.errors import DeadlineExceeded, JournalError
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import Sink
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.groups import batch_group
from speed_async.transport.transport import Delivery, Hub, PeerName

KEPT_KINDS = ("step", "evaluation", "sample", "end")
"""Status events are for the live feed only."""
BATCH_MESSAGES = 64
BATCH_BYTES = 4 * 1024 * 1024
"""Messages taken in before what they led to is sent: the journal is written once for them all."""
MAX_TURNS = 4
"""Turns of taking in that may wait for the disk."""
INLINE_BYTES = 256 * 1024
"""Smaller writes are not worth another thread."""
MEANWHILE_S = 0.001
"""While the disk is busy: wait so long for a message before looking whether it still is."""
FULL_RETRY_S = 0.005
"""A peer's queue that is full is looked at again this soon, for as long as PATIENCE_S."""
PATIENCE_S = 1.0
ROOM_RETRY_S = 0.5
LINGER_S = 2.0


async def serve(
    machine: StateMachine,
    hub: Hub,
    feed: FeedPublisher,
    sinks: Sequence[Sink],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until the service has ended; closes the hub, the feed, the sinks and the journal.

    Raises JournalError when the disk stays full for cluster.stall_timeout_s.
    """
    segments = Segments(machine)
    shell = _Shell(machine, hub, feed, sinks, clock, segments)
    syncing = asyncio.create_task(segments.keep_synced(), name="sync")
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
        await segments.close()


@dataclass(kw_only=True)
class _Turn:
    """What was taken in together, and may be told when it lies in the journal."""

    sealed: Sealed
    spoke: set[str]
    events: list[Event]
    syncs: bool
    writing: "Future[None] | None" = None


class _Shell:
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
        self._sinks = sinks
        self._clock = clock
        self._config = machine.service.config
        # The machine's time goes on where its last input was, however long it was dead.
        self._behind_s = clock() - machine.last_s if machine.last_s else 0.0
        self._interval_s = self._config.observe.status_interval_s
        self._next_tick_s = self._now() + self._interval_s
        self._unsent: dict[str, float] = {}  # peers to be told more, and since when they are full
        self._spoke: set[str] = set()
        self._turns: deque[_Turn] = deque()  # taken in, and not told yet
        self._segments = segments
        self._had_folder = False
        machine.conversations.holding = machine.journal is not None

    def _now(self) -> float:
        return self._clock() - self._behind_s

    async def step(self) -> None:
        """Take in what is there, make it safe, say what follows."""
        await self._take_in()
        now_s = self._now()
        while self._hub.newly_rejected:
            self._machine.refused(self._hub.newly_rejected.pop(), "it was malformed", now_s)
        if now_s >= self._next_tick_s:
            self._machine.tick(now_s, now_s - self._next_tick_s)
            self._look_for_folder()
            self._next_tick_s = self._now() + self._interval_s
            for peer, probe in self._machine.conversations.probes(now_s):
                self._offer(peer, probe)
        turn, journal = self._taken_in(), self._machine.journal
        if journal is not None and (
            self._turns or turn.syncs or journal.pending_bytes > INLINE_BYTES
        ):
            turn.writing = self._segments.start_writing(syncs=turn.syncs)
        self._turns.append(turn)
        while self._turns and (len(self._turns) > MAX_TURNS or not self._is_writing):
            await self._finish_turn()
        if self._segments.is_due(self._now()):
            await self._finish_turns()
            self._segments.begin(self._now())

    def _taken_in(self) -> _Turn:
        machine, journal = self._machine, self._machine.journal
        every = self._config.buffer.durability == "every"
        events, machine.events = machine.events, []
        spoke, self._spoke = self._spoke, set()
        turn = _Turn(
            sealed=machine.conversations.seal(),
            spoke=spoke,
            events=events,
            syncs=journal is not None
            and (machine.needs_sync or (every and journal.pending_bytes > 0)),
        )
        machine.needs_sync = False
        return turn

    async def _finish_turn(self) -> None:
        """Wait until the first turn lies in the journal, then say what follows from it."""
        turn = self._turns[0]
        await self._written(turn)
        self._turns.popleft()
        self._tell(turn.sealed, turn.spoke)
        self._mute()
        await self._publish(turn.events)

    async def _finish_turns(self) -> None:
        while self._turns:
            await self._finish_turn()

    async def linger(self) -> None:
        """Everything was said: wait a moment until everybody has heard it.

        What peers say is not taken in any more, and so not heard either: another life of the run
        must not lack what this one said to have.
        """
        ends_s = self._now() + LINGER_S
        conversations, service = self._machine.conversations, self._machine.service
        await self._finish_turns()
        peers = [*service.membership.actors, service.membership.learner or ""]
        while any(map(conversations.num_unacked, peers)) and (left_s := ends_s - self._now()) > 0:
            self._tell(conversations.seal(), set())
            try:
                peer, message = await self._hub.receive(min(left_s, 0.1))
            except DeadlineExceeded:
                continue
            if conversations.admit(peer, message, self._now()):
                conversations.overheard(peer, message)
        self._tell(conversations.seal(), set())

    # --- in ------------------------------------------------------------------------------------

    async def _take_in(self) -> None:
        """The next message, and those that wait behind it; while the disk is busy with the turn
        before, also those that come meanwhile."""
        wait_s = MEANWHILE_S if self._is_writing else self._longest_wait_s()
        received = await self._next_message(wait_s)
        machine, count = self._machine, 0
        while received is not None or self._is_writing:
            if received is not None:
                peer, message = received
                machine.message(peer, message, self._now(), self._hub.key_of(peer))
                self._spoke.add(peer)
                count += 1
                pending = machine.journal.pending_bytes if machine.journal is not None else 0
                if count == BATCH_MESSAGES or pending > BATCH_BYTES or machine.service.ended:
                    return
            received = self._hub.receive_now()
            if received is None and self._is_writing:
                received = await self._next_message(MEANWHILE_S)

    async def _next_message(self, wait_s: float) -> tuple[PeerName, m.Message] | None:
        try:
            return await self._hub.receive(wait_s)
        except DeadlineExceeded:
            return None

    def _longest_wait_s(self) -> float:
        now_s = self._now()
        wait_s = max(0.0, self._next_tick_s - now_s)
        if any(now_s - since_s < PATIENCE_S for since_s in self._unsent.values()):
            return min(wait_s, FULL_RETRY_S)
        return wait_s

    @property
    def _is_writing(self) -> bool:
        """Whether the disk is busy with the first turn."""
        writing = self._turns[0].writing if self._turns else None
        return writing is not None and not writing.done()

    def _mute(self) -> None:
        """Whoever was refused was told why just now."""
        guard = self._machine.service.validator
        while guard.to_mute:
            self._hub.mute(guard.to_mute.pop())
        guard.num_malformed, guard.num_muted = self._hub.rejected, self._hub.muted.num_muted

    # --- disk ----------------------------------------------------------------------------------

    async def _written(self, turn: _Turn) -> None:
        """Wait until the disk has taken a turn. Meanwhile nothing is answered, so nobody goes on;
        and no time passes for the machine, so nobody is taken for dead."""
        if self._machine.journal is None:
            return
        began_s = self._clock()
        while True:
            try:
                if turn.writing is None:
                    self._segments.write(syncs=turn.syncs)
                else:
                    await asyncio.shield(asyncio.wrap_future(turn.writing))
                break
            except OSError as error:
                waited_s = self._clock() - began_s
                if waited_s > self._config.cluster.stall_timeout_s:
                    raise JournalError(
                        f"the journal in '{self._config.run.folder}' could not be written for "
                        f"{waited_s:.0f} s ({error}): make room, then resume the run"
                    ) from error
                text = f"the journal cannot be written ({error.strerror}): the run waits for room"
                if text not in self._machine.service.warning:
                    sys.stderr.write(text + "\n")
                self._machine.service.warnings.open("journal", text)
                await self._feed.publish(self._machine.service.present_status(self._now()))
                await asyncio.sleep(ROOM_RETRY_S)
                for waiting in self._turns:
                    waiting.writing = self._segments.start_writing(syncs=waiting.syncs)
        self._machine.service.warnings.close("journal")
        waited_s = self._clock() - began_s
        if waited_s > ROOM_RETRY_S:
            self._behind_s += waited_s

    def _look_for_folder(self) -> None:
        """Files that are open can be written also when their folder has been removed, so nothing
        else would tell."""
        folder = Path(self._config.run.folder)
        had_folder, self._had_folder = self._had_folder, (folder / CONFIG_FILE).exists()
        if had_folder and not self._had_folder:
            text = (
                f"the run folder '{folder}' was removed or moved: this run's metrics and journal "
                "are lost and it cannot be resumed; stop it, or let it go on for its checkpoints"
            )
            self._machine.service.warnings.open("folder", text)

    # --- out -----------------------------------------------------------------------------------

    def _tell(self, sealed: Sealed, spoke: set[str]) -> None:
        """Say what may be said now, as far as there is room, and to `spoke` that it was heard."""
        conversations = self._machine.conversations
        conversations.release(sealed)
        for peer, reply in sealed.replies:
            self._hub.offer(peer, reply)
        for peer in sealed.unsent:
            self._unsent.setdefault(peer, self._now())
        for peer in filter(conversations.has_unsent, spoke):  # it may have been gone
            self._unsent.setdefault(peer, self._now())
        for peer in list(self._unsent):
            self._send_to(peer)
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
            group = self._read(message.place)
        return batch_group(group, number=message.number, heard=message.heard)

    def _read(self, place: Place) -> m.GroupFinished:
        """A group from the journal. Raises JournalError, with the remedy."""
        journal = self._machine.journal
        assert journal is not None
        try:
            group = decode(journal.read(place).frames)
        except JournalError as error:
            raise JournalError(
                f"a group that is to be trained cannot be read: {error}. Move '{journal.folder}' "
                "away and resume: the run then goes on from its last checkpoint, without the "
                "groups that were not trained yet"
            ) from error
        assert isinstance(group, m.GroupFinished)
        return group

    async def _publish(self, events: list[Event]) -> None:
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
                text = f"metrics could not be written: {error}"
                self._machine.service.warnings.open("metrics", text, fleeting=True)
