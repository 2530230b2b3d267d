"""The scripted engine and task in a whole run: real processes and broadcasts, no inference."""

import random
from pathlib import Path

import pytest
from torch import tensor, zeros

from speed_async.actors.engine import GenerationRequest
from speed_async.config.sections.task import TaskConfig
from speed_async.environments.registry import make_task
from speed_async.errors import WeightSyncError
from speed_async.testing.scripted_run import DiscardedWeights, random_script
from speed_async.testing.scripted_task import PASS_RATES
from speed_async.weight_sync.channel import TransferReport
from tests.fakes.engine_contract import offer
from tests.fakes.run_process import start, train_command, write_config

SCRIPTED = ["--actors.engine", "scripted", "--task.name", "scripted"]
CLOSED_STREAMS = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")


@pytest.mark.parametrize("backend", [pytest.param("gloo", marks=pytest.mark.slow), "ipc"])
def test_scripted_run_without_streams_receives_every_version_and_its_ledger_balances(
    tmp_path: Path, backend: str
) -> None:
    """Started as `speed-async train ... <&- >&- 2>&-`, as some daemons start their children."""
    options = (*SCRIPTED, "--run.updates", "30", "--weights.backend", backend)
    run = start(tmp_path, [*CLOSED_STREAMS, *train_command(write_config(tmp_path), *options)])
    assert run.finish()[0] == 0
    summary = run.summary()
    assert summary["completed"] is True
    assert summary["optimizer_updates"] == 30
    assert summary["ledger"]["closes"] is True
    assert summary["weights"]["failed"] == 0
    groups = summary["ledger"]["groups"]
    assert groups["trained"] == 60
    assert groups["screened_out"] > 0
    newest = run.events("evaluation")[-1]
    assert (newest["oldest_version"], newest["newest_version"]) == (30, 30)
    assert run.processes() == {}


def test_prompts_pass_at_their_rate_deterministically() -> None:
    task = make_task(TaskConfig(name="scripted", num_prompts=len(PASS_RATES), num_held_out=1))
    for prompt, rate in zip(task.train_prompts, PASS_RATES, strict=True):
        rewards = [task.score(prompt, f"answer {index}") for index in range(2000)]
        assert rewards == [task.score(prompt, f"answer {index}") for index in range(2000)]
        assert sum(rewards) / 2000 == pytest.approx(rate, abs=0.05)
    assert task.held_out_prompts[0].text not in {prompt.text for prompt in task.train_prompts}


def test_random_scripts_are_seeded_and_within_vocabulary_and_limit() -> None:
    request = GenerationRequest(
        prompt_token_ids=None,  # type: ignore[arg-type] - unused
        max_new_tokens=4,
        temperature=1.0,
        top_p=1.0,
        priority=0,
    )
    script, again = (random_script(random.Random(5), 10) for _ in range(2))
    drawn = [script(request, index) for index in range(500)]
    assert drawn == [again(request, index) for index in range(500)]
    assert {len(tokens) for tokens in drawn} == {1, 2, 3, 4}
    assert {token for tokens in drawn for token in tokens} == {*range(10)}


class Transfer:
    """A receiver of one tensor that fails after its first bucket when `is_interrupted`."""

    def __init__(self) -> None:
        self.is_interrupted = False
        self.value = 0.0

    def receive(self, offer, expected, load) -> TransferReport:
        load([("w", tensor([self.value]))])
        if self.is_interrupted:
            raise WeightSyncError("the sender disconnected")
        return TransferReport(num_bytes=4, num_buckets=1, transfer_s=0.5)

    def close(self) -> None: ...


def test_interrupted_transfer_invalidates_weights_until_the_next_transfer() -> None:
    transfer = Transfer()
    weights = DiscardedWeights({"w": zeros(1)}, transfer)
    transfer.value = 1.0
    assert weights.receive(offer(1)) == 0.5
    assert (weights.tensors["w"].item(), weights.has_valid_weights) == (1.0, True)
    transfer.is_interrupted = True
    with pytest.raises(WeightSyncError):
        weights.receive(offer(2))
    assert not weights.has_valid_weights
    transfer.is_interrupted = False
    weights.receive(offer(3))
    assert weights.has_valid_weights
