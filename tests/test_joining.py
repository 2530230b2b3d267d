"""Joins are bounded for each key and forgotten when nothing follows; an index belongs to a key."""

import asyncio
import contextlib
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import uvloop
import zmq
from buffer_fixtures import make_config

from speed_async.buffer.curriculum.curriculum import UniformCurriculum
from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.durability.snapshot import capture
from speed_async.buffer.membership import JOIN_TIMEOUT_S
from speed_async.buffer.server import serve
from speed_async.buffer.service import BufferService
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation import MAX_PENDING_JOINS, MAX_PENDING_JOINS_PER_KEY
from speed_async.config.schema import Config
from speed_async.errors import DeadlineExceeded
from speed_async.evaluation.plan import EvaluationPlan
from speed_async.launcher.roles import join as admission
from speed_async.transport import messages as m
from speed_async.transport.codec import encode
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.joining import Join, JoinAccepted
from speed_async.transport.peer_names import new_identity
from speed_async.transport.zeromq import ZmqHub, open_hub, open_link
from speed_async.types import ActorCounts

JOIN = Join(machine="there", process_id=1)
COUNTS = ActorCounts()
PATIENCE_S = 90.0


def build(config: Config) -> BufferService:
    return BufferService(
        config,
        curriculum=UniformCurriculum(100, np.random.default_rng(0)),
        evaluations=EvaluationPlan(num_prompts=1, num_samples=1, every=0),
        fingerprint="f",
        started_s=0.0,
    )


def hello(index: int, incarnation: int = 0) -> m.Hello:
    return m.Hello(
        role="actor", index=index, incarnation=incarnation, fingerprint="f", process_id=1
    )


class Room:
    """A machine with its journal, one learner and one actor, both of the key `own`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.config = make_config(str(folder), run={"updates": 10})
        self.folder = folder / "journal"
        self.machine, _ = open_machine(self.folder, self.config, build, life=0)
        self.now_s = 1.0
        learner = replace(hello(0), role="learner")
        for peer, message in (("learner", learner), ("actor-1.0", hello(1))):
            self.say(peer, replace(message, number=1), "own")

    def say(self, peer: str, message: m.Message, key: str) -> m.Message:
        """Its last answer."""
        self.machine.message(peer, message, self.now_s, key)
        return self.heard(peer)

    def heard(self, peer: str) -> m.Message:
        conversations, answers = self.machine.conversations, []
        answers += [answer for name, answer in conversations.replies if name == peer]
        conversations.replies.clear()
        while (answer := conversations.next_unsent(peer)) is not None:
            answers.append(answer)
            conversations.queued_one(peer)
        return answers[-1]

    def pass_time(self, seconds: float) -> None:
        """The actor goes on telling that it lives."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            self.machine.message("actor-1.0", m.ActorReport(counts=COUNTS, gauges={}), self.now_s)
            self.machine.tick(self.now_s, 0.0)
        self.machine.events.clear()

    def size(self) -> int:
        return len(capture(self.machine))

    def journal_bytes(self) -> int:
        journal = self.machine.journal
        assert journal is not None
        return journal.num_bytes


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "run")


@pytest.mark.parametrize("number", [0, 1])
def test_three_thousand_joins_of_one_key_are_bounded_and_expire(room: Room, number: int) -> None:
    """With a session (number 1) or without; nobody else's joins are in their way."""
    room.pass_time(1)
    before, written = room.size(), room.journal_bytes()
    answers = [
        room.say(f"join-{name}", replace(JOIN, number=number), "stranger") for name in range(3000)
    ]
    accepted = [answer for answer in answers if isinstance(answer, JoinAccepted)]
    refused = [answer for answer in answers if isinstance(answer, m.Rejected)]
    assert len(accepted) == MAX_PENDING_JOINS_PER_KEY
    assert len(accepted) + len(refused) == 3000
    assert "too many actors of its key" in refused[0].reason
    assert (
        room.journal_bytes() - written < 512 * MAX_PENDING_JOINS_PER_KEY
    )  # the refused are not recorded
    friend = room.say("join-friend", JOIN, "own")
    assert isinstance(friend, JoinAccepted)
    assert isinstance(room.say(f"actor-{friend.index}.0", hello(friend.index), "own"), m.Welcome)
    room.pass_time(JOIN_TIMEOUT_S + 2)
    assert room.size() - before < 2048
    assert room.machine.service.membership.num_known == 3  # two actors and the friend
    after = room.say("join-again", JOIN, "stranger")
    assert isinstance(after, JoinAccepted)


def test_joins_of_all_keys_together_are_bounded(room: Room) -> None:
    answers = [
        room.say(f"join-{name}", JOIN, f"key-{name % 100}")
        for name in range(MAX_PENDING_JOINS + 100)
    ]
    assert sum(isinstance(answer, JoinAccepted) for answer in answers) == MAX_PENDING_JOINS


def test_slow_actor_is_admitted_after_its_join_expired(room: Room) -> None:
    slow = room.say("join-slow", JOIN, "own")
    assert isinstance(slow, JoinAccepted)
    room.pass_time(JOIN_TIMEOUT_S + 2)
    newer = room.say("join-new", JOIN, "own")
    assert isinstance(newer, JoinAccepted)
    assert newer.index != slow.index
    name = f"actor-{slow.index}.0"
    assert isinstance(room.say(name, hello(slow.index), "own"), m.Welcome)
    assert room.machine.service.membership.num_wanted == 2


def test_join_does_not_expire_after_the_hello_of_its_actor(room: Room) -> None:
    accepted = room.say("join-a", JOIN, "own")
    assert isinstance(accepted, JoinAccepted)
    name = f"actor-{accepted.index}.0"
    assert isinstance(room.say(name, hello(accepted.index), "own"), m.Welcome)
    room.pass_time(JOIN_TIMEOUT_S + 2)
    failure = m.Failure(role="actor-2", message="no such folder")
    room.machine.message("join-a", failure, room.now_s, "own")
    assert not room.machine.service.ended
    assert room.machine.service.warning == "actor-2 left: no such folder"


def test_repeated_join_gets_the_same_reply_and_is_not_recorded(room: Room) -> None:
    first = room.say("join-a", JOIN, "own")
    before, written = room.size(), room.journal_bytes()
    for _ in range(100):
        assert room.say("join-a", JOIN, "own") == first
    assert (room.size(), room.journal_bytes()) == (before, written)


def test_supervisor_that_fails_before_the_hello_of_its_actor_is_removed(room: Room) -> None:
    before = room.machine.service.membership.num_known
    room.say("join-a", JOIN, "own")
    room.machine.message("join-a", m.Failure(role="actor-2", message="no model"), room.now_s, "own")
    assert room.machine.service.membership.num_known == before
    assert not room.machine.service.ended


def test_index_of_an_actor_belongs_to_its_key(room: Room) -> None:
    """Under a name of its own, another key takes neither a rank's place nor a joined actor's."""
    joined = room.say("join-a", JOIN, "own")
    assert isinstance(joined, JoinAccepted)
    for index in (1, joined.index):
        for incarnation in (0, 1, 5):
            thief = f"actor-{index}.9{incarnation}"
            answer = room.say(thief, hello(index, incarnation), "stranger")
            assert isinstance(answer, m.Rejected)
            assert "belongs to another key" in answer.reason
    lie = m.Failure(role="actor-1", message="end it")
    assert isinstance(room.say("actor-1.77", lie, "stranger"), m.Rejected)
    service = room.machine.service
    assert list(service.membership.actors) == ["actor-1.0"]
    assert not service.ended
    assert isinstance(room.say("actor-1.1", hello(1, 1), "own"), m.Welcome)
    assert "actor-1.0" in service.membership.lost


def test_earlier_incarnation_does_not_replace_a_later_one(room: Room) -> None:
    room.say("actor-1.7", hello(1, 7), "own")
    answer = room.say("actor-1.6", hello(1, 6), "own")
    assert isinstance(answer, m.Rejected)
    assert "a later incarnation of actor-1 is here" in answer.reason


def test_rank_may_have_another_key_in_the_next_attempt(room: Room) -> None:
    room.machine.begin_attempt(1, room.now_s)
    answer = room.say("actor-1.1000", hello(1, 1000), "of another host")
    assert isinstance(answer, m.Welcome)


def test_replay_restores_joins_and_keys(room: Room) -> None:
    for name in range(3):
        room.say(f"join-{name}", JOIN, "own")
    room.say("actor-2.0", replace(hello(2), number=1), "own")
    room.pass_time(5)
    assert room.machine.journal is not None
    room.machine.journal.write()
    again, notes = open_machine(room.folder, room.config, build, life=0)
    assert notes == []
    assert capture(again.service.membership) == capture(room.machine.service.membership)
    again.message("actor-2.5", hello(2, 5), room.now_s, "stranger")
    assert isinstance(again.conversations.replies[-1][1], m.Rejected)


def test_flood_of_joins_over_sockets_leaves_no_state_and_does_not_affect_others(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), run={"updates": 10}, buffer={"durability": "none"})
    machine, late_s = StateMachine(build(config)), 0.0
    loop_clock = asyncio.new_event_loop().time

    async def scene() -> None:
        nonlocal late_s
        hub: ZmqHub = await open_hub("127.0.0.1", 0)
        feed = FeedPublisher("127.0.0.1", 0)
        serving = asyncio.create_task(
            serve(machine, hub, feed, [], clock=lambda: loop_clock() + late_s)
        )
        actor = await open_link("127.0.0.1", hub.port, "actor-1.0")
        await actor.send(hello(1))
        assert isinstance(await actor.receive(PATIENCE_S), m.Welcome)
        before = len(capture(machine))
        await asyncio.to_thread(flood, hub.port, 1200)
        members = machine.service.membership
        assert members.num_pending() == MAX_PENDING_JOINS_PER_KEY
        assert list(members.actors) == ["actor-1.0"]
        late_s = JOIN_TIMEOUT_S + 1.0
        async with asyncio.timeout(PATIENCE_S):
            while members.num_pending():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await actor.send(m.ActorReport(counts=COUNTS, gauges={}))
        assert len(capture(machine)) - before < 4096
        await actor.send(m.Failure(role="actor-1", message="that is all"))
        await serving
        await actor.close()

    uvloop.run(asyncio.wait_for(scene(), 3 * PATIENCE_S))


def flood(port: int, count: int) -> None:
    """Joins of so many supervisors, each over a connection of its own; all are answered."""
    context: zmq.Context = zmq.Context()
    try:
        for _ in range(count):
            peer = context.socket(zmq.DEALER)
            peer.LINGER = 0
            peer.RCVTIMEO = int(1000 * PATIENCE_S)
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

    async def scene() -> None:
        first = await open_hub("127.0.0.1", 0)
        port = first.port
        asking = asyncio.create_task(
            admission.ask_for_place(
                lambda: ("127.0.0.1", port),
                stopping=asyncio.Event(),
                timeout_s=PATIENCE_S,
                keys=None,
            )
        )
        assert isinstance((await first.receive(PATIENCE_S))[1], Join)
        await first.close()
        second = await open_hub("127.0.0.1", port)
        peer, message = await second.receive(PATIENCE_S)
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

    uvloop.run(asyncio.wait_for(scene(), 3 * PATIENCE_S))
