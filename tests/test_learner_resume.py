"""The learner's side of a resume, against a service that follows the protocol and can be scripted.

The loop, the publisher and the checkpoints' order are the real ones; the trainer counts.
"""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from buffer_fixtures import make_config, make_group
from learner_samples import make_config as make_learner_config
from learner_samples import random_groups, save_tiny_llama
from test_loops import CountingUpdates

from speed_async.buffer.sessions import FORGOTTEN
from speed_async.config.schema import Config
from speed_async.errors import RoleError
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions, latest_valid
from speed_async.learner.inbox import Stop
from speed_async.learner.loop import Finished, LearnerLoop
from speed_async.learner.loop import Updates as TrainerSeam
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import named_state
from speed_async.learner.parallel import SingleRank
from speed_async.learner.progress import Progress, Restored, Update
from speed_async.learner.trainer import Trainer
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.testing.memory_channel import MemorySender, MemoryStore
from speed_async.transport import messages as m
from speed_async.transport.groups import batch_group, pack_group
from speed_async.transport.transport import Delivery, Link
from speed_async.types import ActorCounts

PEER = "learner"
HELLO = m.Hello(role="learner", index=0, incarnation=2, fingerprint="f", process_id=1)
DEADLINE_S = 90.0


class Updates(CountingUpdates):
    """Notes everything that is asked of a trainer, and may have no room for a checkpoint."""

    def __init__(self, full_at: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        self.oldest_kept = 0
        self._full_at = full_at

    def save(self, progress: Progress) -> int:
        if progress.policy_version in self._full_at:
            raise OSError("No space left on device")
        self.progress.append(progress)
        super().save(progress)
        return self.oldest_kept


class SlowUpdates(Updates):
    """Its checkpoints take until they are let through."""

    def __init__(self, let_through: threading.Event) -> None:
        super().__init__()
        self._let_through = let_through

    def save(self, progress: Progress) -> int:
        assert self._let_through.wait(DEADLINE_S)
        return super().save(progress)


class Service:
    """The service's side, answer by answer. Batch v holds the groups 10 v and 10 v + 1."""

    def __init__(self, hub: InProcessHub, policy_version: int) -> None:
        self.heard: list[m.Message] = []
        self.on_heard: Callable[[m.Message], Awaitable[None]] | None = None
        self.drains_until: type[m.Message] = m.FinishRun
        """The summary comes when this was heard, and the end was asked for."""
        self.make_group: Callable[[int], m.GroupFinished] = lambda lease_id: make_group(
            lease_id, lease_id
        )
        self._hub = hub
        self._version = policy_version

    async def serve(self) -> None:
        """Until the summary, which ends it."""
        while not (self.of(m.FinishRun) and isinstance(self.heard[-1], self.drains_until)):
            _, message = await self._hub.receive(DEADLINE_S)
            self.heard.append(message)
            if self.on_heard is not None:
                await self.on_heard(message)
            for answer in self._answers(message):
                await self.say(answer)
        await self.say(m.Summary(fields={}))

    async def say(self, message: m.Message) -> None:
        assert self._hub.offer(PEER, message) is Delivery.QUEUED

    def _answers(self, message: m.Message) -> list[m.Message]:
        match message:
            case m.Hello():
                return [m.Welcome(policy_version=self._version)]
            case m.TakeBatch(policy_version=version):
                ids = [10 * version, 10 * version + 1]
                groups = [batch_group(self.make_group(lease_id)) for lease_id in ids]
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
        return [message for message in self.heard if isinstance(message, kind)]

    def story(self) -> list[str]:
        """What was heard, in order, with versions; what only accompanies is left out."""
        left_out = (m.Hello, m.WeightsPublished, m.TakeBatch, m.FinishRun)
        return [
            f"{type(message).__name__} {getattr(message, 'policy_version', '')}"
            for message in self.heard
            if not isinstance(message, left_out)
        ]


class Stage:
    def __init__(
        self, config: Config, updates: TrainerSeam, version: int, restored: Restored | None
    ) -> None:
        self.hub = InProcessHub()
        self.link = self.hub.connect(PEER)
        self.service = Service(self.hub, version)
        self.stop = Stop()
        self.updates: Any = updates
        self.service.drains_until = m.CheckpointSaved
        self._config, self._restored = config, restored
        self.loop = self.learner(self.link)

    def learner(self, link: Link) -> LearnerLoop:
        return LearnerLoop(
            self._config,
            link=link,
            updates=self.updates,
            sender=MemorySender(MemoryStore(), bucket_bytes=1024),
            backend="gloo",
            stop=self.stop,
            restored=self._restored,
        )

    async def run(self) -> Finished:
        async with asyncio.timeout(DEADLINE_S), self._serving():
            return await self.loop.run(HELLO)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        serving = asyncio.create_task(self.service.serve())
        yield
        await serving


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., Stage]:
    (tmp_path / "config.json").write_text("{}")

    def make(
        *,
        updates: int,
        service_at: int,
        restored: Restored | None = None,
        trainer: Updates | None = None,
        every: int = 2,
    ) -> Stage:
        config = make_config(
            str(tmp_path), run={"updates": updates}, learner={"checkpoint_every": every}
        )
        return Stage(config, trainer or Updates(), service_at, restored)

    return make


def restored_at(version: int, *, notices: tuple[str, ...] = (), **progress: object) -> Restored:
    return Restored(progress=Progress(policy_version=version, **progress), notices=notices)


def test_a_learner_behind_the_service_replays_without_publishing(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> tuple[Stage, Finished]:
        recent = (Update(policy_version=2, lease_ids=(8, 9)),)
        restored = restored_at(
            2,
            service_sequence=77,
            num_skipped=1,
            groups_trained=2,
            completions_trained=8,
            tokens_trained=24,
            recent_updates=recent,
        )
        stage = make_stage(updates=8, service_at=5, restored=restored)
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert stage.service.story() == [
        "Resumed 2",
        "Trained 3",
        "Trained 4",  # a checkpoint would be due here
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
    [resumed] = stage.service.of(m.Resumed)
    assert isinstance(resumed, m.Resumed)
    assert (resumed.service_sequence, resumed.recent_lease_ids) == (77, [8, 9])
    assert (resumed.groups_trained, resumed.completions_trained, resumed.tokens_trained) == (
        2, 8, 24,
    )  # fmt: skip
    asked = [take.policy_version for take in stage.service.of(m.TakeBatch)]  # pyright: ignore
    assert asked == [2, 3, 4, 5, 6, 7]
    trained = stage.service.of(m.Trained)[0]
    assert isinstance(trained, m.Trained)
    assert trained.lease_ids == [20, 21]
    assert (trained.groups_trained, trained.completions_trained) == (4, 16)  # counted on
    assert (finished.policy_version, finished.optimizer_updates) == (8, 7)
    assert finished.completions_trained == 8 + 6 * 2 * 4


def test_a_learner_without_a_checkpoint_replays_from_the_start(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> Stage:
        stage = make_stage(updates=3, service_at=3)
        await stage.run()
        return stage

    assert asyncio.run(run()).service.story() == [
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
    make_stage: Callable[..., Stage], service_at: int
) -> None:
    """Also where actors came first and the service said so: that word is answered already."""

    async def run() -> Stage:
        stage = make_stage(updates=5, service_at=service_at, restored=restored_at(4))

        async def actors_join(message: m.Message) -> None:
            if isinstance(message, m.Resumed | m.PublishWeights) and not stage.updates.batches:
                await stage.service.say(m.MembershipChanged(reason="actor-1.2000 joined"))

        stage.service.on_heard = actors_join
        await stage.run()
        return stage

    stage = asyncio.run(run())
    assert stage.service.story()[:3] == ["Resumed 4", "PublishWeights 4", "Trained 5"]
    first_take = next(i for i, x in enumerate(stage.service.heard) if isinstance(x, m.TakeBatch))
    assert isinstance(stage.service.heard[first_take - 1], m.WeightsPublished)


def test_an_actor_that_joins_during_the_replay_receives_the_final_version(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> Stage:
        stage = make_stage(updates=4, service_at=3, restored=restored_at(0))

        async def actor_joins(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch) and message.policy_version == 1:
                await stage.service.say(m.MembershipChanged(reason="actor-3.0 joined"))

        stage.service.on_heard = actor_joins
        await stage.run()
        return stage

    story = asyncio.run(run()).service.story()
    assert [line for line in story if line.startswith("Publish")] == [
        "PublishWeights 3",
        "PublishWeights 4",
    ]


def test_a_stop_during_the_replay_keeps_the_older_checkpoint(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> tuple[Stage, Finished]:
        stage = make_stage(updates=9, service_at=6, restored=restored_at(2))

        async def stop(message: m.Message) -> None:
            if isinstance(message, m.Trained) and message.policy_version == 4:
                stage.stop.set()

        stage.service.drains_until = m.FinishRun
        stage.service.on_heard = stop
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert not finished.completed
    assert stage.updates.progress == []
    assert not stage.service.of(m.PrepareCheckpoint)
    assert not stage.service.of(m.PublishWeights)


def test_a_reached_target_ends_the_run_after_the_replay(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> tuple[Stage, Finished]:
        stage = make_stage(updates=9, service_at=3, restored=restored_at(1))

        async def reached(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch) and message.policy_version == 1:
                await stage.service.say(m.TargetReached(accuracy=0.9, policy_version=3))

        stage.service.on_heard = reached
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert finished.completed
    assert finished.policy_version == 3
    assert stage.updates.saved == [3]


def test_no_checkpoint_is_saved_without_training(make_stage: Callable[..., Stage]) -> None:
    async def run() -> Stage:
        stage = make_stage(updates=9, service_at=4, restored=restored_at(4))
        stage.service.drains_until = m.FinishRun
        stage.stop.set()
        await stage.run()
        return stage

    stage = asyncio.run(run())
    assert stage.updates.progress == []
    assert stage.service.story() == ["Resumed 4", "PublishWeights 4"]


def test_a_checkpoint_records_the_journal_sequence_and_recent_groups(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> Stage:
        stage = make_stage(updates=6, service_at=0)
        stage.updates.oldest_kept = 0

        async def keep_two(message: m.Message) -> None:
            if isinstance(message, m.PrepareCheckpoint):
                stage.updates.oldest_kept = max(2, message.policy_version - 2)

        stage.service.on_heard = keep_two
        await stage.run()
        return stage

    stage = asyncio.run(run())
    assert [p.service_sequence for p in stage.updates.progress] == [200, 400, 600]
    assert [p.recent_lease_ids for p in stage.updates.progress] == [
        [0, 1, 10, 11],
        [20, 21, 30, 31],
        [20, 21, 30, 31, 40, 41, 50, 51],
    ]
    saved = [
        (message.policy_version, message.oldest_kept_version)
        for message in stage.service.of(m.CheckpointSaved)
        if isinstance(message, m.CheckpointSaved)
    ]
    assert saved == [(2, 2), (4, 2), (6, 4)]


def test_a_failed_checkpoint_is_reported_and_training_continues(
    make_stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> tuple[Stage, Finished]:
        stage = make_stage(updates=6, service_at=0, trainer=Updates(frozenset({2})))
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert finished.completed
    assert finished.save_error == ""
    assert stage.updates.saved == [4, 6]
    # What the failed one would have kept is remembered by the next.
    assert stage.updates.progress[0].recent_lease_ids == [0, 1, 10, 11, 20, 21, 30, 31]
    told = "checkpoint of version 2 could not be saved: No space left on device; training goes on"
    assert finished.notices == (told,)
    assert told in capsys.readouterr().err
    notices = {x.policy_version: x.notice for x in stage.service.of(m.Trained)}  # pyright: ignore
    assert notices == {1: "", 2: "", 3: told, 4: "", 5: "", 6: ""}


def test_a_failed_last_checkpoint_is_an_error(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> tuple[Stage, Finished]:
        stage = make_stage(updates=2, service_at=0, trainer=Updates(frozenset({2})))
        stage.service.drains_until = m.FinishRun
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert "could not be saved: No space left on device" in finished.save_error
    assert finished.service_fields == {}
    assert not stage.service.of(m.CheckpointSaved)


def test_a_finished_service_is_not_notified_of_a_checkpoint(
    make_stage: Callable[..., Stage],
) -> None:
    """It would keep the link open for nothing."""

    async def run() -> Stage:
        summarised = threading.Event()
        stage = make_stage(updates=1, service_at=0, trainer=SlowUpdates(summarised))
        stage.service.drains_until = m.FinishRun
        receive = stage.link.receive

        async def receive_and_say_so(deadline_s: float) -> m.Message:
            message = await receive(deadline_s)
            if isinstance(message, m.Summary):  # at the loop's next turn it has been taken in
                asyncio.get_running_loop().call_soon(summarised.set)
            return message

        stage.link.receive = receive_and_say_so
        await stage.run()
        return stage

    stage = asyncio.run(run())
    assert stage.updates.saved == [1]
    assert not stage.service.of(m.CheckpointSaved)


def test_damaged_checkpoints_are_reported_to_the_service_and_in_the_summary(
    make_stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> tuple[Stage, Finished]:
        restored = restored_at(2, notices=("version-000004 is damaged", "and version-000003"))
        stage = make_stage(updates=4, service_at=4, restored=restored)
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    [resumed] = stage.service.of(m.Resumed)
    assert isinstance(resumed, m.Resumed)
    assert resumed.notice == "version-000004 is damaged; and version-000003"
    assert finished.notices == ("version-000004 is damaged", "and version-000003")
    assert "going on from version 2, replaying to 4" in capsys.readouterr().err


def test_a_learner_that_fell_back_to_the_start_reports_why_and_replays(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> tuple[Stage, Finished]:
        restored = restored_at(0, notices=("version-000002 is damaged",))
        stage = make_stage(updates=3, service_at=2, restored=restored)
        return stage, await stage.run()

    stage, finished = asyncio.run(run())
    assert stage.service.story()[:4] == ["Resumed 0", "Trained 1", "Trained 2", "PublishWeights 2"]
    assert finished.notices == ("version-000002 is damaged",)


def test_the_error_of_a_rejected_learner_contains_the_resume_command(
    make_stage: Callable[..., Stage],
) -> None:
    """The service lost the tail of its journal, and with it what it told the learner."""

    async def run() -> None:
        stage = make_stage(updates=4, service_at=0)

        async def refuse(message: m.Message) -> None:
            if isinstance(message, m.TakeBatch):
                await stage.service.say(m.Rejected(reason=FORGOTTEN))

        stage.service.on_heard = refuse
        async with asyncio.timeout(DEADLINE_S):
            serving = asyncio.create_task(stage.service.serve())
            try:
                await stage.loop.run(HELLO)
            finally:
                serving.cancel()

    with pytest.raises(RoleError) as caught:
        asyncio.run(run())
    assert str(caught.value) == (
        f"buffer service: refused a message of the learner: {FORGOTTEN}; `speed-async train "
        "--resume runs/default` goes on from the newest checkpoint (with cluster.max_restarts the "
        "run does so by itself)"
    )


def test_the_error_of_an_unregistered_learner_has_no_resume_command(
    make_stage: Callable[..., Stage],
) -> None:
    async def run() -> None:
        stage = make_stage(updates=4, service_at=0)
        await stage.service.say(m.Rejected(reason="the run has a learner (learner)"))
        await stage.loop.run(HELLO)

    with pytest.raises(RoleError) as caught:
        asyncio.run(run())
    said = "buffer service: refused a message of the learner: the run has a learner (learner)"
    assert str(caught.value) == said


class WaitsForRoom:
    """A service whose disk is full while it is asked for these: what it is waited for is noted."""

    def __init__(self, link: Link) -> None:
        self.waited_s: dict[str, float] = {}
        self._link = link
        self._asked = ""

    async def send(self, message: m.Message) -> None:
        self._asked = type(message).__name__
        await self._link.send(message)

    async def receive(self, deadline_s: float) -> m.Message:
        self.waited_s[self._asked] = max(deadline_s, self.waited_s.get(self._asked, 0.0))
        return await self._link.receive(deadline_s)

    async def close(self) -> None:
        await self._link.close()


def test_the_learner_waits_while_the_service_waits_for_disk_space(
    make_stage: Callable[..., Stage],
) -> None:
    """It says nothing until its journal can be written, up to cluster.stall_timeout_s."""

    async def run() -> dict[str, float]:
        stage = make_stage(updates=3, service_at=0)
        link = WaitsForRoom(stage.link)
        stage.loop = stage.learner(link)
        await stage.run()
        return link.waited_s

    waited_s = asyncio.run(run())
    for asked in ("TakeBatch", "PublishWeights", "PrepareCheckpoint"):
        assert waited_s[asked] >= 600.0, asked


# --- with a real trainer -------------------------------------------------------------------------


def recorded_group(lease_id: int) -> m.GroupFinished:
    """The same group whenever it is asked for, as a journal has it."""
    [group] = random_groups(lease_id, num_groups=1)
    return pack_group(replace(group, lease_id=lease_id), ActorCounts())


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    optimizer = trainer._optimizer  # pyright: ignore[reportPrivateUsage]
    state = named_state(optimizer, trainer.model) | dict(trainer.weights())
    return {name: tensor.clone() for name, tensor in state.items()}


def live(folder: Path, *, service_at: int) -> tuple[dict[int, dict[str, torch.Tensor]], Finished]:
    """One life, from the newest whole checkpoint if there is one: the state of model and optimiser
    at every version that was published, and how it ended."""
    learner = {"lr": 0.01, "warmup_updates": 3, "checkpoint_every": 2, "keep_last": 9}
    config = make_learner_config(folder, **learner)
    config = config.model_copy(update={"run": config.run.model_copy(update={"updates": 7})})
    model = load_model(folder, device="cpu")
    trainer = Trainer(config=config, model=model, parallel=SingleRank())
    found, restored = latest_valid(Path(config.run.folder) / "checkpoints", 9), None
    if found is not None and found.folder is not None:
        progress = trainer.restore(found.folder)
        restored = Restored(progress=progress, notices=found.notices)
    states: dict[int, dict[str, torch.Tensor]] = {}

    async def run() -> Finished:
        stage = Stage(config, trainer, service_at, restored)
        stage.service.make_group = recorded_group

        async def remember(message: m.Message) -> None:
            if isinstance(message, m.PublishWeights):  # the learner waits for the answer
                states[message.policy_version] = state_of(trainer)

        stage.service.on_heard = remember
        return await stage.run()

    return states, asyncio.run(run())


@pytest.mark.parametrize(("checkpoint", "service_at"), [(4, 4), (4, 5), (2, 6), (None, 3), (4, 7)])
def test_weights_published_after_a_replay_are_bitwise_identical(
    tmp_path: Path, checkpoint: int | None, service_at: int
) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    before, straight = live(folder, service_at=0)
    root = folder / "run" / "checkpoints"
    assert kept_versions(root) == [2, 4, 6, 7]
    for version in kept_versions(root):
        if checkpoint is None or version > checkpoint:
            shutil.rmtree(checkpoint_folder(root, version))

    after, resumed = live(folder, service_at=service_at)

    assert list(after) == list(range(service_at, 8))
    for version, state in after.items():
        assert before[version].keys() == state.keys()
        different = [name for name in state if not torch.equal(state[name], before[version][name])]
        assert different == [], f"at version {version}"
    assert resumed == straight  # counts as well
