"""The server loop: an input is written before its effects are sent, and receiving continues."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.buffer.durability.journal import Journal, read_segment, segments
from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.server import serve
from speed_async.buffer.state_machine import StateMachine
from speed_async.errors import JournalError
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.transport.feed import FeedPublisher
from speed_async.transport.session import SessionLink
from speed_async.transport.transport import Delivery
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import FINGERPRINTS, builder, make_config, make_group
from tests.fakes.service_harness import evaluated

MAX_REPORTS = 5000
TIMEOUT_S = 90.0
build = builder(num_held_out=1)


def written(folder: Path) -> dict[str, int]:
    """By peer: number of its last message in the journal."""
    last: dict[str, int] = {}
    for number in segments(folder):
        for _, record in read_segment(folder, number):
            if record.kind == "message":
                last[record.peer] = decode(record.frames).number
    return last


class RecordingHub(InProcessHub):
    """Records messages that acknowledge an input before it is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.too_early: list[m.Message] = []
        self.num_sent = 0

    def offer(self, peer: str, message: m.Message) -> Delivery:
        if message.received > written(self.folder).get(peer, 0):
            self.too_early.append(message)
        self.num_sent += 1
        return super().offer(peer, message)


class SlowDisk:
    """A first write that lasts until another input is processed, and a second write that begins
    after the effects of the first are sent."""

    def __init__(self, hub: RecordingHub, monkeypatch: pytest.MonkeyPatch) -> None:
        self.overlapped = False
        self.expects_input = False
        write = Journal.write

        def slow_write(journal: Journal) -> None:
            if self.overlapped:
                num_sent = hub.num_sent
                wait_until(lambda: hub.num_sent > num_sent, 0.3)
            sequence = journal.sequence
            write(journal)
            if self.expects_input and not self.overlapped:
                self.overlapped = wait_until(lambda: journal.sequence > sequence, 5.0)

        monkeypatch.setattr(Journal, "write", slow_write)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    pause = threading.Event()
    for _ in range(int(1000 * seconds)):
        if condition():
            return True
        pause.wait(0.001)
    return False


def report(number: int) -> m.ActorReport:
    return m.ActorReport(counts=ActorCounts(), gauges={"slots_busy": float(number)})


def hello(role: str, index: int) -> m.Hello:
    return m.Hello(role=role, index=index, incarnation=0, fingerprint="f", process_id=1)


async def settle(link: SessionLink) -> None:
    """Wait until all sent messages are acknowledged."""
    receiving = asyncio.create_task(receive_all(link))
    await link.settle(TIMEOUT_S)
    receiving.cancel()


async def receive_all(link: SessionLink) -> None:
    while True:
        await link.receive(TIMEOUT_S)


async def send_reports(machine: StateMachine, hub: RecordingHub, disk: SlowDisk) -> int:
    """Returns the number of messages that the actor sent."""
    feed = FeedPublisher("127.0.0.1", 0)
    serving = asyncio.create_task(serve(machine, hub, feed, []))
    actor, learner = (SessionLink(hub.connect(name)) for name in ("actor-1.0", "learner"))
    await actor.send(hello("actor", 1))
    assert isinstance(await actor.receive(TIMEOUT_S), m.Welcome)
    disk.expects_input = True
    num_sent = 1
    while not disk.overlapped and num_sent < MAX_REPORTS:
        await actor.send(report(num_sent))
        num_sent += 1
        await asyncio.sleep(0)
    disk.expects_input = False
    await settle(actor)
    await learner.send(m.Failure(role="learner", message="that is all"))
    await serving
    return num_sent


def test_no_effect_is_sent_before_its_input_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = tmp_path / "journal"
    config = make_config(str(tmp_path), buffer={"durability": "every"})
    machine, _ = open_machine(folder, config, build, **FINGERPRINTS, attempt=0)
    hub = RecordingHub(folder)
    disk = SlowDisk(hub, monkeypatch)
    sending = send_reports(machine, hub, disk)
    num_sent = asyncio.run(asyncio.wait_for(sending, 2 * TIMEOUT_S))
    assert hub.too_early == []
    assert hub.num_sent > 0
    assert disk.overlapped
    assert written(folder)["actor-1.0"] == num_sent
    recovered, notes = open_machine(folder, config, build, **FINGERPRINTS, attempt=0)
    assert notes == []
    assert recovered.sessions.admit("actor-1.0", m.Message(number=num_sent + 1), 0.0)


async def send_malformed(machine: StateMachine, hub: InProcessHub) -> m.Leases:
    """Returns the leases of a second actor after the holder of all leases sent a malformed
    frame."""
    feed = FeedPublisher("127.0.0.1", 0)
    serving = asyncio.create_task(serve(machine, hub, feed, []))
    names = ("actor-1.0", "actor-2.0", "learner")
    first, second, learner = (SessionLink(hub.connect(name)) for name in names)
    want = m.WantWork(counts=ActorCounts(), num_prompts=1)
    await first.send(hello("actor", 1))
    await first.send(want)
    while not isinstance(await first.receive(TIMEOUT_S), m.Leases):
        pass
    await second.send(hello("actor", 2))
    await second.send(replace(want, num_prompts=1000))
    hub._inbox.put_now(("actor-1.0", [b"malformed"]))  # pyright: ignore[reportPrivateUsage]
    leases: m.Message = m.Drain(reason="")
    while not (isinstance(leases, m.Leases) and leases.kind == "evaluation"):
        leases = await second.receive(TIMEOUT_S)
    await learner.send(m.Failure(role="learner", message="that is all"))
    await serving
    return leases


def test_actor_that_sends_malformed_frames_is_lost_and_its_prompts_are_requeued(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), cluster={"peer_timeout_s": 10_000.0})
    machine, _ = open_machine(tmp_path / "journal", config, build, **FINGERPRINTS, attempt=0)
    leases = asyncio.run(asyncio.wait_for(send_malformed(machine, InProcessHub()), 2 * TIMEOUT_S))
    assert leases.prompt_ids == [0]
    assert list(machine.service.membership.lost) == ["actor-1.0"]
    recovered, notes = open_machine(tmp_path / "journal", config, build, **FINGERPRINTS, attempt=0)
    assert notes == []
    assert recovered.service.membership.lost == machine.service.membership.lost


async def move_folder(machine: StateMachine, hub: InProcessHub) -> str:
    feed = FeedPublisher("127.0.0.1", 0)
    serving = asyncio.create_task(serve(machine, hub, feed, []))
    folder = Path(machine.service.config.run.folder)
    learner = SessionLink(hub.connect("learner"))
    await learner.send(hello("learner", 0))
    assert isinstance(await learner.receive(TIMEOUT_S), m.Welcome)
    async with asyncio.timeout(TIMEOUT_S):
        started_s = machine.last_s
        while machine.last_s < started_s + 1.2:  # noqa: ASYNC110 (two ticks)
            await asyncio.sleep(0.01)
        assert machine.service.warning == ""
        folder.rename(folder.with_name("elsewhere"))  # noqa: ASYNC240
        while not machine.service.warning:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await learner.send(m.Failure(role="learner", message="that is all"))
    await serving
    return machine.service.warning


def test_removal_of_the_run_folder_raises_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    run = {"folder": str(folder)}
    config = make_config(str(folder), run=run, buffer={"durability": "none"})
    warning = asyncio.run(move_folder(StateMachine(build(config, None)), InProcessHub()))
    assert f"the run folder '{folder}' was removed or moved" in warning


async def corrupt_groups(machine: StateMachine, hub: InProcessHub) -> None:
    """A learner requests a batch whose groups are spilled to a corrupted journal segment."""
    feed = FeedPublisher("127.0.0.1", 0)
    serving = asyncio.create_task(serve(machine, hub, feed, []))
    actor, learner = (SessionLink(hub.connect(name)) for name in ("actor-1.0", "learner"))
    want = m.WantWork(counts=ActorCounts(), num_prompts=8)
    await learner.send(hello("learner", 0))
    await actor.send(hello("actor", 1))
    await actor.send(want)
    num_groups = 0
    while num_groups < 2:
        message = await actor.receive(TIMEOUT_S)
        if not isinstance(message, m.Leases):
            continue
        for lease_id, prompt_id in zip(message.lease_ids, message.prompt_ids, strict=True):
            if message.kind == "evaluation":
                await actor.send(evaluated(lease_id, counts=ActorCounts()))
            else:
                await actor.send(make_group(lease_id, prompt_id))
                num_groups += 1
    await settle(actor)
    journal = machine.journal
    assert journal is not None
    path = journal.folder / f"{journal.segment:08d}.journal"
    path.write_bytes(bytes(path.stat().st_size))
    await learner.send(m.TakeBatch(policy_version=0, num_groups=2))
    await serving


def test_corrupted_group_ends_the_run_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), buffer={"spill": True})
    no_capacity = config.buffer.model_copy(update={"capacity_bytes": 1})
    config = config.model_copy(update={"buffer": no_capacity})
    machine, _ = open_machine(tmp_path / "journal", config, build, **FINGERPRINTS, attempt=0)
    with pytest.raises(JournalError, match=r"Move '.*journal' away and resume"):
        asyncio.run(asyncio.wait_for(corrupt_groups(machine, InProcessHub()), 2 * TIMEOUT_S))
