"""Joins are bounded per key and expire without a Hello; an index belongs to a key."""

import asyncio
import contextlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
import zmq

from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.durability.snapshot import capture
from speed_async.buffer.membership import JOIN_TIMEOUT_S
from speed_async.buffer.server import serve
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation import MAX_PENDING_JOINS, MAX_PENDING_JOINS_PER_KEY
from speed_async.errors import DeadlineExceeded
from speed_async.launcher.roles import join as admission
from speed_async.transport import messages as m
from speed_async.transport.codec import encode
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.peer_names import new_identity
from speed_async.transport.zeromq import ZmqHub, open_hub, open_link
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import FINGERPRINTS, builder, make_config

JOIN = Join(machine="there", process_id=1)
COUNTS = ActorCounts()
TIMEOUT_S = 90.0
build = builder(num_held_out=1)


def hello(index: int, incarnation: int = 0) -> m.Hello:
    return m.Hello(
        role="actor", index=index, incarnation=incarnation, fingerprint="f", process_id=1
    )


class MachineHarness:
    """A state machine with a journal, one learner and one actor, both with the key `own`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.config = make_config(str(folder), run={"updates": 10})
        self.folder = folder / "journal"
        self.machine, _ = open_machine(self.folder, self.config, build, **FINGERPRINTS, attempt=0)
        self.now_s = 1.0
        learner = replace(hello(0), role="learner")
        for peer, message in (("learner", learner), ("actor-1.0", hello(1))):
            self.send(peer, replace(message, number=1), "own")

    def send(self, peer: str, message: m.Message, key: str) -> m.Message:
        """Send a message of a peer; returns its last reply."""
        self.machine.message(peer, message, self.now_s, key)
        return self.last_reply(peer)

    def last_reply(self, peer: str) -> m.Message:
        sessions, replies = self.machine.sessions, []
        replies += [reply for name, reply in sessions.replies if name == peer]
        sessions.replies.clear()
        while (reply := sessions.next_unsent(peer)) is not None:
            replies.append(reply)
            sessions.mark_queued(peer)
        return replies[-1]

    def close_expired(self, seconds: float) -> None:
        """Advance the clock with reports of the actor and ticks."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            self.machine.message("actor-1.0", m.ActorReport(counts=COUNTS, gauges={}), self.now_s)
            self.machine.tick(self.now_s, 0.0)
        self.machine.take_output()

    def size(self) -> int:
        return len(capture(self.machine.state))

    def journal_bytes(self) -> int:
        journal = self.machine.journal
        assert journal is not None
        return journal.num_bytes


@pytest.fixture
def harness(tmp_path: Path) -> MachineHarness:
    return MachineHarness(tmp_path / "run")


@pytest.mark.parametrize("number", [0, 1])
def test_three_thousand_joins_of_one_key_are_bounded_and_expire(
    harness: MachineHarness, number: int
) -> None:
    """With a session (number 1) or without it. Joins of other keys are not affected."""
    harness.close_expired(1)
    before, written = harness.size(), harness.journal_bytes()
    replies = [
        harness.send(f"join-{name}", replace(JOIN, number=number), "other") for name in range(3000)
    ]
    accepted = [reply for reply in replies if isinstance(reply, JoinAccepted)]
    refused = [reply for reply in replies if isinstance(reply, m.Rejected)]
    assert len(accepted) == MAX_PENDING_JOINS_PER_KEY
    assert len(accepted) + len(refused) == 3000
    assert "too many actors with this key" in refused[0].reason
    assert (
        harness.journal_bytes() - written < 512 * MAX_PENDING_JOINS_PER_KEY
    )  # the refused are not recorded
    friend = harness.send("join-friend", JOIN, "own")
    assert isinstance(friend, JoinAccepted)
    assert isinstance(
        harness.send(f"actor-{friend.index}.0", hello(friend.index), "own"), m.Welcome
    )
    harness.close_expired(JOIN_TIMEOUT_S + 2)
    assert harness.size() - before < 2048
    assert harness.machine.service.membership.num_known == 3  # two actors and the friend
    after = harness.send("join-again", JOIN, "other")
    assert isinstance(after, JoinAccepted)


def test_joins_of_all_keys_together_are_bounded(harness: MachineHarness) -> None:
    replies = [
        harness.send(f"join-{name}", JOIN, f"key-{name % 100}")
        for name in range(MAX_PENDING_JOINS + 100)
    ]
    assert sum(isinstance(reply, JoinAccepted) for reply in replies) == MAX_PENDING_JOINS


def test_slow_actor_is_admitted_after_its_join_expired(harness: MachineHarness) -> None:
    slow = harness.send("join-slow", JOIN, "own")
    assert isinstance(slow, JoinAccepted)
    harness.close_expired(JOIN_TIMEOUT_S + 2)
    newer = harness.send("join-new", JOIN, "own")
    assert isinstance(newer, JoinAccepted)
    assert newer.index != slow.index
    name = f"actor-{slow.index}.0"
    assert isinstance(harness.send(name, hello(slow.index), "own"), m.Welcome)
    assert harness.machine.service.membership.num_expected == 2


def test_join_does_not_expire_after_the_hello_of_its_actor(harness: MachineHarness) -> None:
    accepted = harness.send("join-a", JOIN, "own")
    assert isinstance(accepted, JoinAccepted)
    name = f"actor-{accepted.index}.0"
    assert isinstance(harness.send(name, hello(accepted.index), "own"), m.Welcome)
    harness.close_expired(JOIN_TIMEOUT_S + 2)
    failure = m.Failure(role="actor-2", message="no such folder")
    harness.machine.message("join-a", failure, harness.now_s, "own")
    assert not harness.machine.service.ended
    assert harness.machine.service.warning == "actor-2 left: no such folder"


def test_the_supervisor_of_an_actor_reports_its_death_at_once(harness: MachineHarness) -> None:
    """A later report, about an incarnation that was replaced, has no effect."""
    harness.send("actor-1.0", hello(1), "own")
    exited = m.ActorExited(role="actor-1", incarnation=0, how="died (SIGKILL, log: a.log)")
    supervisor = "actor-1.join-x"
    assert isinstance(harness.send("actor-2.join-y", exited, "other"), m.Rejected)
    harness.machine.message(supervisor, exited, harness.now_s, "own")
    service = harness.machine.service
    assert service.warning == "actor-1 died (SIGKILL, log: a.log); its supervisor restarts it"
    assert service.membership.lost["actor-1.0"] == "died (SIGKILL, log: a.log)"
    harness.send("actor-1.1", hello(1, 1), "own")
    harness.machine.message(supervisor, replace(exited, number=2), harness.now_s, "own")
    assert [state.name for state in service.membership.present()] == ["actor-1.1"]


def test_repeated_join_gets_the_same_reply_and_is_not_recorded(harness: MachineHarness) -> None:
    first = harness.send("join-a", JOIN, "own")
    before, written = harness.size(), harness.journal_bytes()
    for _ in range(100):
        assert harness.send("join-a", JOIN, "own") == first
    assert (harness.size(), harness.journal_bytes()) == (before, written)


def test_supervisor_that_fails_before_the_hello_of_its_actor_is_removed(
    harness: MachineHarness,
) -> None:
    before = harness.machine.service.membership.num_known
    harness.send("join-a", JOIN, "own")
    harness.machine.message(
        "join-a", m.Failure(role="actor-2", message="no model"), harness.now_s, "own"
    )
    assert harness.machine.service.membership.num_known == before
    assert not harness.machine.service.ended


def test_index_of_an_actor_belongs_to_its_key(harness: MachineHarness) -> None:
    """Another key cannot use the index of a rank or of a joined actor, even under a new name."""
    joined = harness.send("join-a", JOIN, "own")
    assert isinstance(joined, JoinAccepted)
    for index in (1, joined.index):
        for incarnation in (0, 1, 5):
            intruder = f"actor-{index}.9{incarnation}"
            reply = harness.send(intruder, hello(index, incarnation), "other")
            assert isinstance(reply, m.Rejected)
            assert "belongs to another key" in reply.reason
    false_failure = m.Failure(role="actor-1", message="end it")
    assert isinstance(harness.send("actor-1.77", false_failure, "other"), m.Rejected)
    service = harness.machine.service
    assert list(service.membership.actors) == ["actor-1.0"]
    assert not service.ended
    assert isinstance(harness.send("actor-1.1", hello(1, 1), "own"), m.Welcome)
    assert "actor-1.0" in service.membership.lost


def test_earlier_incarnation_does_not_replace_a_later_one(harness: MachineHarness) -> None:
    harness.send("actor-1.7", hello(1, 7), "own")
    reply = harness.send("actor-1.6", hello(1, 6), "own")
    assert isinstance(reply, m.Rejected)
    assert "a later incarnation of actor-1 is running" in reply.reason


def test_rank_may_have_another_key_in_the_next_attempt(harness: MachineHarness) -> None:
    harness.machine.begin_attempt(1, harness.now_s)
    reply = harness.send("actor-1.1000", hello(1, 1000), "of another host")
    assert isinstance(reply, m.Welcome)


def test_replay_restores_joins_and_keys(harness: MachineHarness) -> None:
    for name in range(3):
        harness.send(f"join-{name}", JOIN, "own")
    harness.send("actor-2.0", replace(hello(2), number=1), "own")
    harness.close_expired(5)
    assert harness.machine.journal is not None
    harness.machine.journal.write()
    recovered, notes = open_machine(
        harness.folder, harness.config, build, **FINGERPRINTS, attempt=0
    )
    assert notes == []
    harness.machine.service.membership.restart_timeouts(harness.machine.last_s)
    assert recovered.state.service.membership == harness.machine.state.service.membership
    recovered.message("actor-2.5", hello(2, 5), harness.now_s, "other")
    assert isinstance(recovered.sessions.replies[-1][1], m.Rejected)


def test_flood_of_joins_over_sockets_leaves_no_state_and_does_not_affect_others(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), run={"updates": 10}, buffer={"durability": "none"})
    machine, late_s = StateMachine(build(config, None)), 0.0
    loop_clock = asyncio.new_event_loop().time

    async def scenario() -> None:
        nonlocal late_s
        hub: ZmqHub = await open_hub("127.0.0.1", 0)
        feed = FeedPublisher("127.0.0.1", 0)
        serving = asyncio.create_task(
            serve(machine, hub, feed, [], clock=lambda: loop_clock() + late_s)
        )
        actor = await open_link("127.0.0.1", hub.port, "actor-1.0")
        await actor.send(hello(1))
        assert isinstance(await actor.receive(TIMEOUT_S), m.Welcome)
        before = len(capture(machine.state))
        await asyncio.to_thread(flood, hub.port, 1200)
        members = machine.service.membership
        assert members.num_pending() == MAX_PENDING_JOINS_PER_KEY
        assert list(members.actors) == ["actor-1.0"]
        late_s = JOIN_TIMEOUT_S + 1.0
        async with asyncio.timeout(TIMEOUT_S):
            while members.num_pending():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await actor.send(m.ActorReport(counts=COUNTS, gauges={}))
        assert len(capture(machine.state)) - before < 4096
        await actor.send(m.Failure(role="actor-1", message="that is all"))
        await serving
        await actor.close()

    uvloop.run(asyncio.wait_for(scenario(), 3 * TIMEOUT_S))


def flood(port: int, count: int) -> None:
    """Send joins of `count` supervisors, each over a separate connection, and await the replies."""
    context: zmq.Context = zmq.Context()
    try:
        for _ in range(count):
            peer = context.socket(zmq.DEALER)
            peer.LINGER = 0
            peer.RCVTIMEO = int(1000 * TIMEOUT_S)
            peer.IDENTITY = new_identity(f"join-{threading.get_ident()}-{_}")
            peer.connect(f"tcp://127.0.0.1:{port}")
            peer.send_multipart(encode(JOIN))
            peer.recv_multipart()
            peer.close()
    finally:
        context.destroy(linger=0)


def test_supervisor_repeats_its_join_after_the_service_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "ASK_AGAIN_S", 0.2)
    accepted = JoinAccepted(index=7, config="{}", feed_port=1)

    async def scenario() -> None:
        first = await open_hub("127.0.0.1", 0)
        port = first.port
        asking = asyncio.create_task(
            admission.request_admission(
                lambda: ("127.0.0.1", port),
                stopping=asyncio.Event(),
                timeout_s=TIMEOUT_S,
                keys=None,
            )
        )
        assert isinstance((await first.receive(TIMEOUT_S))[1], Join)
        await first.close()
        second = await open_hub("127.0.0.1", port)
        peer, message = await second.receive(TIMEOUT_S)
        while not asking.done():
            if isinstance(message, Join):
                second.offer(peer, accepted)
            with contextlib.suppress(DeadlineExceeded):
                peer, message = await second.receive(0.1)
        place = await asking
        assert place is not None
        assert place.accepted == accepted
        await place.link.close()
        await second.close()

    uvloop.run(asyncio.wait_for(scenario(), 3 * TIMEOUT_S))
