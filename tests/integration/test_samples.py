"""Completion samples: selected by the actor, emitted by the service, written by the sink."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speed_async.actors.rollout import LeaseProgress
from speed_async.actors.sample_selector import SampleSelector
from speed_async.buffer.durability.journal import read_segment, segments
from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation_rules import MAX_TEXT
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.types import ActorCounts, Completion, Lease, LeaseKind, Prompt, Sampled
from tests.fakes.buffer_fixtures import FINGERPRINTS, make_config
from tests.fakes.loop_run import Run
from tests.fakes.sample_keys import SAMPLE_KEYS
from tests.fakes.service_harness import ServiceHarness

SAMPLE = m.Sample(
    policy_version=0,
    prompt_id=3,
    held_out=False,
    decision="continued",
    reward=1.0,
    passed=True,
    is_extracted=True,
    extracted="7",
    truncated=False,
    num_tokens=3,
    prompt="3+4=",
    completion="it is 7",
    counts=ActorCounts(),
)


def completion(reward: float, *, truncated: bool = False) -> Completion:
    sampled = Sampled(
        token_ids=np.array([1, 2], np.int32),
        logprobs=np.zeros(2, np.float32),
        policy_versions=np.array([4, 5], np.int32),
        finish_reason="length" if truncated else "stop",
    )
    return Completion(sampled=sampled, reward=reward, passed=reward >= 1.0)


def work(*rewards: float) -> LeaseProgress:
    lease = Lease(lease_id=0, prompt_id=0, kind=LeaseKind.TRAINING)
    return LeaseProgress(lease=lease, completions=[completion(reward) for reward in rewards])


def test_passing_and_failing_completions_alternate_at_the_interval() -> None:
    now_s = 0.0
    selector = SampleSelector(2.0, is_gated=True, clock=lambda: now_s)
    rewards: list[float | None] = []
    for now_s in (0.0, 1.9, 2.0, 4.0, 6.0, 8.0):
        selected = selector.select(work(0.0, 1.0, 0.0) if now_s < 6 else work(0.0, 0.0))
        rewards.append(None if selected is None else selected.reward)
    assert rewards == [1.0, None, 0.0, 1.0, 0.0, 0.0]
    now_s = 20.0
    assert selector.select(work()) is None
    assert selector.select(work(0.5)) is not None


def test_sample_message_has_the_fields_of_the_event() -> None:
    selector = SampleSelector(1.0, is_gated=True, clock=lambda: 0.0)
    prompt = Prompt(prompt_id=8, text="p" * 9000, answer="")
    lease = work(0.0)
    selected = completion(0.0, truncated=True)
    message = selector.message(selected, lease, prompt, "c" * 9000, ActorCounts())
    assert (message.policy_version, message.prompt_id, message.num_tokens) == (5, 8, 2)
    assert (message.decision, message.truncated, message.held_out) == ("screened out", True, False)
    assert (message.is_extracted, message.extracted) == (False, "")
    assert message.completion == "c" * 9000  # encoding shortens it


def sample_events(harness: ServiceHarness) -> list[dict[str, object]]:
    return [dict(event.values) for event in harness.events if event.kind == "sample"]


def test_service_emits_samples_without_counting_them(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    counts = harness.counts("actor-1.0")
    before = harness.service.lifecycle.ledger.table(0)
    assert harness.send("actor-1.0", replace(SAMPLE, counts=counts)) == []
    assert harness.send("actor-1.0", replace(SAMPLE, is_extracted=False, counts=counts)) == []
    first, second = sample_events(harness)
    assert set(first) == SAMPLE_KEYS
    assert (first["actor"], first["prompt_id"], first["reward"]) == ("actor-1.0", 3, 1.0)
    assert (first["extracted"], second["extracted"]) == ("7", None)
    assert harness.service.lifecycle.ledger.table(0) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": "x" * (MAX_TEXT + 1)}, "prompt has 4097 characters"),
        ({"decision": "thrown away"}, "decision 'thrown away' is not one of"),
        ({"reward": 2e6}, "reward = 2000000.0 is out of range"),
        ({"reward": float("nan")}, "reward = nan is out of range"),
        ({"num_tokens": 65}, "num_tokens = 65 is more than a completion has"),
        ({"policy_version": 3}, "policy_version = 3 is from the future"),
        ({"prompt_id": -1}, "prompt_id = -1 is out of range"),
    ],
)
def test_invalid_sample_is_rejected(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    sample = replace(SAMPLE, counts=harness.counts("actor-1.0"), **changes)
    [(_, answer)] = harness.send("actor-1.0", sample)
    assert isinstance(answer, m.Rejected) and text in answer.reason
    assert not sample_events(harness)


def test_journal_omits_sample_texts_and_replay_emits_no_sample(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    folder = tmp_path / "journal"
    machine, _ = open_machine(
        folder,
        harness.config,
        lambda _, state: ServiceHarness(tmp_path, state=state).service,
        **FINGERPRINTS,
        attempt=0,
    )
    hello = m.Hello(role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
    machine.message("actor-1.0", replace(hello, number=1), 1.0)
    machine.message("actor-1.0", replace(SAMPLE, completion="secret", number=2), 2.0)
    [event] = [event for event in machine.take_output().events if event.kind == "sample"]
    assert event.values["completion"] == "secret"
    assert machine.journal is not None
    machine.journal.write()
    machine.journal.close()
    records = [record for number in segments(folder) for _, record in read_segment(folder, number)]
    assert not any(b"secret" in bytes(frame) for record in records for frame in record.frames)
    recorded = [decode(record.frames) for record in records if record.kind == "message"]
    assert [type(message).__name__ for message in recorded] == ["Hello", "Sample"]
    replayed, _ = open_machine(
        folder,
        harness.config,
        lambda _, state: ServiceHarness(tmp_path, state=state).service,
        **FINGERPRINTS,
        attempt=0,
    )
    assert replayed.take_output().events == []
    assert isinstance(replayed, StateMachine)
    replayed.message(
        "actor-1.0", replace(SAMPLE, number=3), 3.0
    )  # message numbers continue after the sample
    assert [event.kind for event in replayed.take_output().events] == ["sample"]
    assert replayed.journal is not None
    replayed.journal.close()


def test_run_emits_samples_of_all_decisions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(
        str(tmp_path),
        run={"updates": 5},
        actors={"slots": 16, "max_new_tokens": 8},
        evaluate={"every": 2, "num_samples": 2},
    )
    run = Run(config, 2)
    finished = asyncio.run(asyncio.wait_for(run.execute(), 60))
    assert finished.outcome == "completed"
    samples = [event.values for event in run.sink.events if event.kind == "sample"]
    assert samples and all(set(values) == SAMPLE_KEYS for values in samples)
    for values in samples:
        assert values["extracted"] == str(values["completion"])[-1:]
        assert values["decision"] in ("continued", "screened out", "evaluated")
