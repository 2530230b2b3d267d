"""Resume of the learner against a scripted service that follows the protocol.

The loop, the publisher and the checkpointer are real; the trainer is a counting fake.
"""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speed_async.buffer.sessions import MESSAGES_LOST
from speed_async.config.schema import Config
from speed_async.errors import RoleError
from speed_async.learner.checkpoint.captured import Captured
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions, latest_valid
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import LearnerLoop
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import named_state
from speed_async.learner.optimizer_update import UpdateResult
from speed_async.learner.progress import Progress, Restored, RunResult, Update
from speed_async.learner.trainer import Trainer
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.testing.memory_channel import MemorySender, MemoryStore
from speed_async.transport import messages as m
from speed_async.transport.groups import pack_group
from speed_async.transport.transport import Delivery, Link
from speed_async.types import ActorCounts, Group
from tests.fakes.buffer_fixtures import make_config, make_group
from tests.fakes.learner_samples import make_config as make_learner_config
from tests.fakes.learner_samples import random_groups, save_tiny_llama
from tests.fakes.loop_run import CountingUpdates

PEER = "learner"
HELLO = m.Hello(role="learner", index=0, incarnation=2, fingerprint="f", process_id=1)
DEADLINE_S = 90.0


class Updates(CountingUpdates):
    """Records all calls, and fails to save at the given versions with a full disk."""

    def __init__(self, full_at: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        self.oldest_kept = 0
        self._full_at = full_at

    def write(self, progress: Progress, captured: Captured) -> None:
        if progress.policy_version in self._full_at:
            raise OSError("No space left on device")
        self.progress.append(progress)
        super().write(progress, captured)

    def prune(self) -> int:
        return self.oldest_kept


class SlowUpdates(Updates):
    """Its checkpoints block until an event is set."""

    def __init__(self, may_save: threading.Event) -> None:
        super().__init__()
        self._may_save = may_save

    def write(self, progress: Progress, captured: Captured) -> None:
        assert self._may_save.wait(DEADLINE_S)
        super().write(progress, captured)


class TimedUpdates(Updates):
    """An update takes 10 s and the copy for a checkpoint 3 s, on its own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def update(
        self, groups: Sequence[Group], before_step: Callable[[], None] = lambda: None
    ) -> UpdateResult:
        self.now_s += 10
        return super().update(groups, before_step)

    def capture(self, *, copy: bool = True) -> Captured:
        self.now_s += 3
        return super().capture(copy=copy)


class Service:
    """A fake service. Batch v has the groups 10 v and 10 v + 1."""

    def __init__(self, hub: InProcessHub, policy_version: int) -> None:
        self.received: list[m.Message] = []
        self.on_message: Callable[[m.Message], Awaitable[None]] | None = None
        self.finishes_after: type[m.Message] = m.FinishRun
        """The summary is sent after this message, once `FinishRun` was received."""
        self.make_group: Callable[[int], m.GroupFinished] = lambda lease_id: make_group(
            lease_id, lease_id
        )
        self._hub = hub
        self._version = policy_version

    async def serve(self) -> None:
        """Responds to messages until the summary is sent."""
        while not (self.of(m.FinishRun) and isinstance(self.received[-1], self.finishes_after)):
            _, message = await self._hub.receive(DEADLINE_S)
            self.received.append(message)
            if self.on_message is not None:
                await self.on_message(message)
            for answer in self._answers(message):
                await self.send(answer)
        await self.send(m.Summary(fields={}))

    async def send(self, message: m.Message) -> None:
        assert self._hub.offer(PEER, message) is Delivery.QUEUED

    def _answers(self, message: m.Message) -> list[m.Message]:
        match message:
            case m.Hello():
                return [m.Welcome(policy_version=self._version)]
            case m.TakeBatch(policy_version=version):
                ids = [10 * version, 10 * version + 1]
                groups = [self.make_group(lease_id) for lease_id in ids]
                return [*groups, m.BatchReady(policy_version=version, lease_ids=ids)]
            case m.PublishWeights(policy_version=version):
                return [
                    m.WeightMembers(
                        policy_version=version,
                        epoch=version,
                        actor_names=[],
                        ranks_each=[],
                        world_size=1,
                    )
                ]
            case m.PrepareCheckpoint(policy_version=version):
                return [m.JournalDurable(policy_version=version, service_sequence=100 * version)]
            case _:
                return []

    def of(self, kind: type[m.Message]) -> list[m.Message]:
        return [message for message in self.received if isinstance(message, kind)]

    def message_log(self) -> list[str]:
        """Received messages with their versions, in order, without secondary messages."""
        excluded = (m.Hello, m.WeightsPublished, m.TakeBatch, m.FinishRun, m.StopAsked)
        return [
            f"{type(message).__name__} {getattr(message, 'policy_version', '')}"
            for message in self.received
            if not isinstance(message, excluded)
        ]


class Harness:
    def __init__(
        self, config: Config, updates: Trainer, version: int, restored: Restored | None
    ) -> None:
        self.hub = InProcessHub()
        self.link = self.hub.connect(PEER)
        self.service = Service(self.hub, version)
        self.stop = Stop()
        self.updates: Any = updates
        self.service.finishes_after = m.CheckpointSaved
        self.clock: Callable[[], float] = time.monotonic
        if isinstance(updates, TimedUpdates):
            self.clock = lambda: updates.now_s
        self._config, self._restored = config, restored
        self.loop = self.learner(self.link)

    def learner(self, link: Link) -> LearnerLoop:
        return LearnerLoop(
            self._config,
            link=link,
            trainer=self.updates,
            sender=MemorySender(MemoryStore(), bucket_bytes=1024),
            backend="gloo",
            stop=self.stop,
            restored=self._restored,
            clock=self.clock,
        )

    async def run(self) -> RunResult:
        async with asyncio.timeout(DEADLINE_S), self._serving():
            return await self.loop.run(HELLO)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        serving = asyncio.create_task(self.service.serve())
        yield
        await serving


@pytest.fixture
def make_harness(tmp_path: Path) -> Callable[..., Harness]:
    (tmp_path / "config.json").write_text("{}")

    def make(
        *,
        updates: int,
        service_at: int,
        restored: Restored | None = None,
        trainer: Updates | None = None,
        every: int = 2,
        in_background: bool = False,
        suites: Sequence[dict[str, str]] = (),
    ) -> Harness:
        config = make_config(
            str(tmp_path),
            run={"updates": updates},
            learner={"checkpoint_every": every, "background_checkpoints": in_background},
            evaluate={"suites": list(suites)},
        )
        return Harness(config, trainer or Updates(), service_at, restored)

    return make


def restored_at(version: int, *, notices: tuple[str, ...] = (), **progress: Any) -> Restored:
    return Restored(progress=Progress(policy_version=version, **progress), notices=notices)


def test_a_learner_behind_the_service_replays_without_publishing(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        recent = (Update(policy_version=2, lease_ids=(8, 9)),)
        restored = restored_at(
            2,
            service_sequence=77,
            optimizer_updates=1,
            num_skipped=1,
            groups_trained=2,
            completions_trained=8,
            tokens_trained=24,
            recent_updates=recent,
        )
        harness = make_harness(updates=8, service_at=5, restored=restored)
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert harness.service.message_log() == [
        "Resumed 2",
        "Trained 3",
        "Trained 4",  # no checkpoint during the replay
        "Trained 5",
        "PublishWeights 5",
        "Trained 6",
        "PublishWeights 6",
        "PrepareCheckpoint 6",
        "CheckpointSaved 6",
        "Trained 7",
        "PublishWeights 7",
        "Trained 8",
        "PublishWeights 8",
        "PrepareCheckpoint 8",
        "CheckpointSaved 8",
    ]
    [resumed] = harness.service.of(m.Resumed)
    assert isinstance(resumed, m.Resumed)
    assert (resumed.service_sequence, resumed.recent_lease_ids) == (77, [8, 9])
    assert (resumed.groups_trained, resumed.completions_trained, resumed.tokens_trained) == (
        2, 8, 24,
    )  # fmt: skip
    asked = [take.policy_version for take in harness.service.of(m.TakeBatch)]  # pyright: ignore
    assert asked == [2, 3, 4, 5, 6, 7]
    trained = harness.service.of(m.Trained)[0]
    assert isinstance(trained, m.Trained)
    assert trained.lease_ids == [20, 21]
    assert (trained.groups_trained, trained.completions_trained) == (4, 16)  # cumulative
    assert (finished.progress.policy_version, finished.progress.optimizer_updates) == (8, 7)
    assert finished.progress.completions_trained == 8 + 6 * 2 * 4


def test_the_pause_for_a_checkpoint_is_reported_with_the_next_update(
    make_harness: Callable[..., Harness],
) -> None:
    """It has the wait for the journal, 5 s here, and the copy."""
    updates = TimedUpdates()

    async def run() -> Harness:
        harness = make_harness(updates=5, service_at=0, trainer=updates, in_background=True)

        async def take_time(message: m.Message) -> None:
            if isinstance(message, m.PrepareCheckpoint):
                updates.now_s += 5
            elif isinstance(message, m.TakeBatch):
                updates.now_s += 1

        harness.service.on_message = take_time
        await harness.run()
        return harness

    trained = asyncio.run(run()).service.of(m.Trained)
    names = ("wait", "train", "sync", "checkpoint")
    times = [[x.metrics[f"time/{name}_s"] for name in names] for x in trained]  # pyright: ignore
    assert times == [[1, 10, 0, 0], [1, 10, 0, 0], [1, 10, 0, 8], [1, 10, 0, 0], [1, 10, 0, 8]]


def test_a_learner_without_a_checkpoint_replays_from_the_start(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> Harness:
        harness = make_harness(updates=3, service_at=3)
        await harness.run()
        return harness

    assert asyncio.run(run()).service.message_log() == [
        "Resumed 0",
        "Trained 1",
        "Trained 2",
        "Trained 3",
        "PublishWeights 3",
        "PrepareCheckpoint 3",
        "CheckpointSaved 3",
    ]


@pytest.mark.parametrize("service_at", [4, 1])
def test_a_learner_not_behind_the_service_publishes_once_before_training(
    make_harness: Callable[..., Harness], service_at: int
) -> None:
    """Also when actors joined before: their `MembershipChanged` needs no second broadcast."""

    async def run() -> Harness:
        harness = make_harness(updates=5, service_at=service_at, restored=restored_at(4))

        async def actors_join(message: m.Message) -> None:
            if isinstance(message, m.Resumed | m.PublishWeights) and not harness.updates.batches:
                await harness.service.send(
                    m.MembershipChanged(reason="actor-1.2000 joined", lost=[])
                )

        harness.service.on_message = actors_join
        await harness.run()
        return harness

    harness = asyncio.run(run())
    assert harness.service.message_log()[:3] == ["Resumed 4", "PublishWeights 4", "Trained 5"]
    first_take = next(
        i for i, x in enumerate(harness.service.received) if isinstance(x, m.TakeBatch)
    )
    assert isinstance(harness.service.received[first_take - 1], m.WeightsPublished)


def test_an_actor_that_joins_during_the_replay_receives_the_final_version(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> Harness:
        harness = make_harness(updates=4, service_at=3, restored=restored_at(0))

        async def actor_joins(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch) and message.policy_version == 1:
                await harness.service.send(m.MembershipChanged(reason="actor-3.0 joined", lost=[]))

        harness.service.on_message = actor_joins
        await harness.run()
        return harness

    message_log = asyncio.run(run()).service.message_log()
    assert [line for line in message_log if line.startswith("Publish")] == [
        "PublishWeights 3",
        "PublishWeights 4",
    ]


def test_a_stop_during_the_replay_keeps_the_older_checkpoint(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        harness = make_harness(updates=9, service_at=6, restored=restored_at(2))

        async def stop(message: m.Message) -> None:
            if isinstance(message, m.Trained) and message.policy_version == 4:
                harness.stop.set()

        harness.service.finishes_after = m.FinishRun
        harness.service.on_message = stop
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert finished.outcome != "completed"
    assert harness.updates.progress == []
    assert not harness.service.of(m.PrepareCheckpoint)
    assert not harness.service.of(m.PublishWeights)


def test_a_reached_target_ends_the_run_after_the_replay(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        harness = make_harness(updates=9, service_at=3, restored=restored_at(1))

        async def reached(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch) and message.policy_version == 1:
                await harness.service.send(m.TargetReached(accuracy=0.9, policy_version=3))

        harness.service.on_message = reached
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert finished.outcome == "completed"
    assert finished.progress.policy_version == 3
    assert harness.updates.saved == [3]


def test_a_target_that_is_reached_during_the_last_update_is_in_the_result(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> RunResult:
        harness = make_harness(updates=2, service_at=0)

        async def reached(message: m.Message) -> None:
            if isinstance(message, m.FinishRun):
                await harness.service.send(m.TargetReached(accuracy=0.9, policy_version=1))

        harness.service.on_message = reached
        return await harness.run()

    finished = asyncio.run(run())
    assert (finished.progress.policy_version, finished.accuracy_reached) == (2, 0.9)


def test_no_checkpoint_is_saved_without_training(make_harness: Callable[..., Harness]) -> None:
    async def run() -> Harness:
        harness = make_harness(updates=9, service_at=4, restored=restored_at(4))
        harness.service.finishes_after = m.FinishRun
        harness.stop.set()
        await harness.run()
        return harness

    harness = asyncio.run(run())
    assert harness.updates.progress == []
    assert harness.service.message_log() == ["Resumed 4", "PublishWeights 4"]


def test_a_checkpoint_records_the_journal_sequence_and_recent_groups(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> Harness:
        harness = make_harness(updates=6, service_at=0)
        harness.updates.oldest_kept = 0

        async def keep_two(message: m.Message) -> None:
            if isinstance(message, m.PrepareCheckpoint):
                harness.updates.oldest_kept = max(2, message.policy_version - 2)

        harness.service.on_message = keep_two
        await harness.run()
        return harness

    harness = asyncio.run(run())
    assert [p.service_sequence for p in harness.updates.progress] == [200, 400, 600]
    assert [p.recent_lease_ids for p in harness.updates.progress] == [
        [0, 1, 10, 11],
        [20, 21, 30, 31],
        [20, 21, 30, 31, 40, 41, 50, 51],
    ]
    saved = [
        (message.policy_version, message.oldest_kept_version)
        for message in harness.service.of(m.CheckpointSaved)
        if isinstance(message, m.CheckpointSaved)
    ]
    assert saved == [(2, 2), (4, 2), (6, 4)]


def test_a_failed_checkpoint_is_reported_and_training_continues(
    make_harness: Callable[..., Harness], capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        harness = make_harness(updates=6, service_at=0, trainer=Updates(frozenset({2})))
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert finished.outcome == "completed"
    assert finished.save_error == ""
    assert harness.updates.saved == [4, 6]
    # The next checkpoint includes the groups of the failed one.
    assert harness.updates.progress[0].recent_lease_ids == [0, 1, 10, 11, 20, 21, 30, 31]
    expected_notice = (
        "checkpoint of version 2 could not be saved: No space left on device; training continues"
    )
    assert finished.notices == (expected_notice,)
    assert expected_notice in capsys.readouterr().err
    notices = {x.policy_version: x.notice for x in harness.service.of(m.Trained)}  # pyright: ignore
    assert notices == {1: "", 2: "", 3: expected_notice, 4: "", 5: "", 6: ""}


def test_training_continues_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> Harness:
        may_write = threading.Event()
        trainer = SlowUpdates(may_write)
        harness = make_harness(updates=4, service_at=0, trainer=trainer, in_background=True)

        async def trained(message: m.Message) -> None:
            if isinstance(message, m.Trained) and message.policy_version == 4:
                may_write.set()

        harness.service.on_message = trained
        await harness.run()
        return harness

    harness = asyncio.run(run())
    log = [line for line in harness.service.message_log() if "Publish" not in line]
    assert log == [
        "Trained 1",
        "Trained 2",
        "PrepareCheckpoint 2",
        "Trained 3",
        "Trained 4",
        "CheckpointSaved 2",
        "PrepareCheckpoint 4",
        "CheckpointSaved 4",
    ]
    assert [p.policy_version for p in harness.updates.progress] == [2, 4]


def test_a_checkpoint_that_fails_in_the_background_is_reported(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        trainer = Updates(frozenset({2}))
        harness = make_harness(updates=6, service_at=0, trainer=trainer, in_background=True)
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert harness.updates.saved == [4, 6]
    assert len(finished.notices) == 1
    assert finished.notices[0].startswith("checkpoint of version 2 could not be saved: No space")


def test_a_failed_last_checkpoint_is_an_error(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        harness = make_harness(updates=2, service_at=0, trainer=Updates(frozenset({2})))
        harness.service.finishes_after = m.FinishRun
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert "could not be saved: No space left on device" in finished.save_error
    assert finished.service_fields == {}
    assert not harness.service.of(m.CheckpointSaved)


def test_a_finished_service_is_not_notified_of_a_checkpoint(
    make_harness: Callable[..., Harness],
) -> None:
    """The message would only keep the link open."""

    async def run() -> Harness:
        summary_received = threading.Event()
        harness = make_harness(updates=1, service_at=0, trainer=SlowUpdates(summary_received))
        harness.service.finishes_after = m.FinishRun
        receive = harness.link.receive

        async def receive_and_notify(deadline_s: float) -> m.Message:
            message = await receive(deadline_s)
            if isinstance(message, m.Summary):  # processed in the next iteration of the event loop
                asyncio.get_running_loop().call_soon(summary_received.set)
            return message

        harness.link.receive = receive_and_notify
        await harness.run()
        return harness

    harness = asyncio.run(run())
    assert harness.updates.saved == [1]
    assert not harness.service.of(m.CheckpointSaved)


def test_damaged_checkpoints_are_reported_to_the_service_and_in_the_summary(
    make_harness: Callable[..., Harness], capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        restored = restored_at(2, notices=("version-000004 is damaged", "and version-000003"))
        harness = make_harness(updates=4, service_at=4, restored=restored)
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    [resumed] = harness.service.of(m.Resumed)
    assert isinstance(resumed, m.Resumed)
    assert resumed.notice == "version-000004 is damaged; and version-000003"
    assert finished.notices == ("version-000004 is damaged", "and version-000003")
    assert "resuming from version 2, replaying to 4" in capsys.readouterr().err


def test_a_learner_that_fell_back_to_the_start_reports_why_and_replays(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> tuple[Harness, RunResult]:
        restored = restored_at(0, notices=("version-000002 is damaged",))
        harness = make_harness(updates=3, service_at=2, restored=restored)
        return harness, await harness.run()

    harness, finished = asyncio.run(run())
    assert harness.service.message_log()[:4] == [
        "Resumed 0",
        "Trained 1",
        "Trained 2",
        "PublishWeights 2",
    ]
    assert finished.notices == ("version-000002 is damaged",)


def test_the_error_of_a_rejected_learner_contains_the_resume_command(
    make_harness: Callable[..., Harness],
) -> None:
    """The service lost the tail of its journal, including the session of the learner."""

    async def run() -> None:
        harness = make_harness(updates=4, service_at=0)

        async def refuse(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch):
                await harness.service.send(m.Rejected(reason=MESSAGES_LOST))

        harness.service.on_message = refuse
        async with asyncio.timeout(DEADLINE_S):
            serving = asyncio.create_task(harness.service.serve())
            try:
                await harness.loop.run(HELLO)
            finally:
                serving.cancel()

    with pytest.raises(RoleError) as caught:
        asyncio.run(run())
    assert str(caught.value) == (
        f"buffer service: refused a message of the learner: {MESSAGES_LOST}; `speed-async train "
        "--resume runs/default` resumes from the newest checkpoint (automatically with "
        "cluster.max_restarts)"
    )


def test_the_error_of_an_unregistered_learner_has_no_resume_command(
    make_harness: Callable[..., Harness],
) -> None:
    async def run() -> None:
        harness = make_harness(updates=4, service_at=0)
        await harness.service.send(m.Rejected(reason="the run has a learner (learner)"))
        await harness.loop.run(HELLO)

    with pytest.raises(RoleError) as caught:
        asyncio.run(run())
    expected = "buffer service: refused a message of the learner: the run has a learner (learner)"
    assert str(caught.value) == expected


class RecordingLink:
    """Knows the last request of the learner."""

    def __init__(self, link: Link) -> None:
        self.asked = ""
        self._link = link

    async def send(self, message: m.Message) -> None:
        self.asked = type(message).__name__
        await self._link.send(message)

    async def receive(self, deadline_s: float) -> m.Message:
        return await self._link.receive(deadline_s)

    async def close(self) -> None:
        await self._link.close()


def longest_waits(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The longest deadline of the learner after each kind of request, filled during a run."""
    waited_s: dict[str, float] = {}
    link = RecordingLink(harness.link)
    harness.loop = harness.learner(link)
    timeout = asyncio.timeout

    def record(deadline_s: float) -> asyncio.Timeout:
        waited_s[link.asked] = max(deadline_s, waited_s.get(link.asked, 0.0))
        return timeout(deadline_s)

    monkeypatch.setattr("speed_async.learner.inbox.asyncio.timeout", record)
    return waited_s


def test_the_learner_waits_while_the_service_waits_for_disk_space(
    make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service does not respond until it can write its journal, for up to
    cluster.stall_timeout_s."""

    async def run() -> dict[str, float]:
        harness = make_harness(updates=3, service_at=0)
        waited_s = longest_waits(harness, monkeypatch)
        await harness.run()
        return waited_s

    waited_s = asyncio.run(run())
    for asked in ("TakeBatch", "PublishWeights", "PrepareCheckpoint"):
        assert waited_s[asked] >= 600.0, asked


@pytest.mark.parametrize("num_suites", [0, 3])
def test_the_learner_waits_for_the_summary_while_the_last_evaluation_makes_progress(
    make_harness: Callable[..., Harness],
    num_suites: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its limit is the time without any message, whatever the number of suites."""
    (tmp_path / "suite.jsonl").write_text("")

    async def run() -> dict[str, float]:
        suites = [
            {"name": f"s{i}", "path": str(tmp_path / "suite.jsonl")} for i in range(num_suites)
        ]
        harness = make_harness(updates=1, service_at=0, suites=suites)
        waited_s = longest_waits(harness, monkeypatch)

        async def evaluate(message: m.Message) -> None:
            if isinstance(message, m.FinishRun):
                for _ in range(20):
                    await harness.service.send(m.EvaluationPending())

        harness.service.on_message = evaluate
        await harness.run()
        return waited_s

    # The stall timeout, the time to drain, and a margin.
    assert asyncio.run(run())["FinishRun"] == 600.0 + 20.0 + 10.0


# --- with a real trainer -------------------------------------------------------------------------


def recorded_group(lease_id: int) -> m.GroupFinished:
    """The same group for the same lease, as in a journal."""
    [group] = random_groups(lease_id, num_groups=1)
    return pack_group(replace(group, lease_id=lease_id), ActorCounts())


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    optimizer = trainer._optimizer  # pyright: ignore[reportPrivateUsage]
    state = named_state(optimizer, trainer.model) | dict(trainer.weights())
    return {name: tensor.clone() for name, tensor in state.items()}


def run_attempt(
    folder: Path, *, service_at: int, **learner: Any
) -> tuple[dict[int, dict[str, torch.Tensor]], RunResult]:
    """Runs one attempt, from the newest valid checkpoint if there is one. Returns the state of
    model and optimiser at every published version, and the result."""
    settings = {"lr": 0.01, "warmup_updates": 3, "checkpoint_every": 2, "keep_last": 9}
    config = make_learner_config(folder, **(settings | learner))
    config = config.model_copy(update={"run": config.run.model_copy(update={"updates": 7})})
    model = load_model(folder, device="cpu")
    trainer = Trainer(config=config, model=model)
    found, restored = latest_valid(Path(config.run.folder) / "checkpoints", 9), None
    if found is not None and found.folder is not None:
        progress = trainer.restore(found.folder)
        restored = Restored(progress=progress, notices=found.notices)
    states: dict[int, dict[str, torch.Tensor]] = {}

    async def run() -> RunResult:
        harness = Harness(config, trainer, service_at, restored)
        harness.service.make_group = recorded_group

        async def record_state(message: m.Message) -> None:
            if isinstance(message, m.PublishWeights):  # the learner waits for the response
                states[message.policy_version] = state_of(trainer)

        harness.service.on_message = record_state
        return await harness.run()

    return states, asyncio.run(run())


@pytest.mark.parametrize(
    ("checkpoint", "service_at", "learner"),
    [
        (4, 4, {}),
        (4, 5, {}),
        (2, 6, {}),
        (None, 3, {}),
        (4, 7, {}),
        (2, 6, {"passes": 2, "minibatches": 2}),
    ],
)
def test_weights_published_after_a_replay_are_bitwise_identical(
    tmp_path: Path, checkpoint: int | None, service_at: int, learner: dict[str, Any]
) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    before, uninterrupted = run_attempt(folder, service_at=0, **learner)
    root = folder / "run" / "checkpoints"
    assert kept_versions(root) == [2, 4, 6, 7]
    for version in kept_versions(root):
        if checkpoint is None or version > checkpoint:
            shutil.rmtree(checkpoint_folder(root, version))

    after, resumed = run_attempt(folder, service_at=service_at, **learner)

    assert list(after) == list(range(service_at, 8))
    for version, state in after.items():
        assert before[version].keys() == state.keys()
        different = [name for name in state if not torch.equal(state[name], before[version][name])]
        assert different == [], f"at version {version}"
    assert resumed == uninterrupted  # including all counts
