"""A version is broadcast while the learner computes the gradient of the next batch.

The loops of all roles are the real code; the trainer only records when it would compute and step.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from speed_async.errors import WeightSyncError
from speed_async.learner.optimizer_update import UpdateResult
from speed_async.testing.memory_channel import MemorySender, MemoryStore
from speed_async.types import Group, WeightOffer
from speed_async.weight_sync.canary_check import Canary
from speed_async.weight_sync.channel import NamedTensor, TransferReport, WholeTensors
from tests.fakes.buffer_fixtures import make_config
from tests.fakes.loop_run import CountingUpdates, Run, execute

DEADLINE_S = 20.0
UPDATES = 4
SEND_S = 0.3


class Recorder:
    """Steps of the learner, in order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._changed = threading.Condition()

    def add(self, step: str) -> None:
        with self._changed:
            self.steps.append(step)
            self._changed.notify_all()

    def wait_for(self, step: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: step in self.steps, DEADLINE_S), step


class RecordingUpdates(CountingUpdates):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def update(
        self, groups: Sequence[Group], before_step: Callable[[], None] = lambda: None
    ) -> UpdateResult:
        version = len(self.batches) + 1
        self._recorder.add(f"gradient {version}")
        before_step()
        self._recorder.add(f"step {version}")
        return super().update(groups)


class RecordingSender(MemorySender):
    """With `overlap`, a broadcast ends only after the gradient of the next version. It is so slow
    that a step that does not wait would come first."""

    def __init__(self, store: MemoryStore, recorder: Recorder, *, overlap: bool) -> None:
        super().__init__(store, bucket_bytes=1024)
        self._recorder = recorder
        self._overlap = overlap

    def send(
        self,
        offer: WeightOffer,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        lost: Collection[int] = (),
        whole: WholeTensors | None = None,
    ) -> TransferReport:
        self._recorder.add(f"send {offer.policy_version}")
        report = super().send(offer, tensors, canary, lost, whole)
        if self._overlap and offer.policy_version < UPDATES:
            self._recorder.wait_for(f"gradient {offer.policy_version + 1}")
        time.sleep(SEND_S)
        assert whole is not None
        # The weight of the fake is its number of updates.
        assert whole(["weight"])["weight"].item() == offer.policy_version
        self._recorder.add(f"sent {offer.policy_version}")
        return report


def recorded_run(folder: Path, *, overlap: bool) -> tuple[Run, Recorder]:
    (folder / "config.json").write_text("{}")
    recorder = Recorder()
    run = Run(make_config(str(folder), run={"updates": UPDATES, "overlap": overlap}))
    run.updates = RecordingUpdates(recorder)
    run.make_sender = lambda store: RecordingSender(store, recorder, overlap=overlap)
    assert execute(run).outcome == "completed"
    return run, recorder


def test_the_gradient_of_the_next_batch_is_computed_during_a_broadcast(tmp_path: Path) -> None:
    run, recorder = recorded_run(tmp_path, overlap=True)
    steps = recorder.steps
    for version in range(1, UPDATES):
        order = (f"send {version}", f"sent {version}", f"step {version + 1}")
        assert all(steps.index(one) < steps.index(other) for one, other in pairwise(order)), steps
    assert steps[-1] == f"sent {UPDATES}"  # the run ends after its last broadcast
    assert run.received == {version: float(version) for version in range(1, UPDATES + 1)}


def test_the_time_that_a_step_waits_for_the_broadcast_is_not_training(tmp_path: Path) -> None:
    run, _ = recorded_run(tmp_path, overlap=True)
    updates = [event.values for event in run.sink.events if event.kind == "step"]
    assert len(updates) == UPDATES
    for values in updates[1:]:
        sync_s, train_s = values["time/sync_s"], values["time/train_s"]
        assert isinstance(sync_s, float) and isinstance(train_s, float)
        assert sync_s >= SEND_S > train_s >= 0


def test_without_overlap_the_next_batch_is_requested_after_the_broadcast(tmp_path: Path) -> None:
    _, recorder = recorded_run(tmp_path, overlap=False)
    assert recorder.steps == [
        f"{step} {version}"
        for version in range(1, UPDATES + 1)
        for step in ("gradient", "step", "send", "sent")
    ]


class FailingSender(MemorySender):
    def send(self, *_: object, **__: object) -> TransferReport:
        raise WeightSyncError("the network is gone")


@pytest.mark.parametrize("updates", [1, 3])
def test_a_failed_broadcast_ends_the_run_with_its_error(tmp_path: Path, updates: int) -> None:
    """Also while the learner waits for a batch, which then never comes."""
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path), run={"updates": updates}, weights={"deadline_s": 1.0})
    run = Run(config)
    run.make_sender = lambda store: FailingSender(store, bucket_bytes=1024)
    with pytest.raises(ExceptionGroup) as caught:
        execute(run)
    assert caught.group_contains(WeightSyncError, match="the network is gone")
