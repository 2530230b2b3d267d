"""Completions that people are shown: chosen by the actor, told by the service, kept by the sink."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from buffer_fixtures import make_config
from run_process import start_train
from service_harness import ServiceHarness
from test_loops import Run

from speed_async.actors.rollout import LeaseWork, Refused
from speed_async.actors.sample_choice import MAX_TEXT_CHARS, SampleChoice, shortened
from speed_async.buffer.durability.journal import read_segment, segments
from speed_async.buffer.durability.recovery import open_machine
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation_rules import MAX_TEXT
from speed_async.transport import messages as m
from speed_async.transport.codec import decode
from speed_async.types import ActorCounts, Completion, Lease, LeaseKind, Prompt, Sampled

KEYS = {
    "wall_s",
    "policy_version",
    "actor",
    "prompt_id",
    "held_out",
    "decision",
    "reward",
    "extracted",
    "truncated",
    "num_tokens",
    "prompt",
    "completion",
}
SAMPLE = m.Sample(
    policy_version=0,
    prompt_id=3,
    held_out=False,
    decision="continued",
    reward=1.0,
    is_extracted=True,
    extracted="7",
    truncated=False,
    num_tokens=3,
    prompt="3+4=",
    completion="it is 7",
    counts=ActorCounts(),
)


def completion(reward: float, *, cut: bool = False) -> Completion:
    sampled = Sampled(
        token_ids=np.array([1, 2], np.int32),
        logprobs=np.zeros(2, np.float32),
        policy_versions=np.array([4, 5], np.int32),
        finish_reason="length" if cut else "stop",
    )
    return Completion(sampled=sampled, reward=reward)


def work(*rewards: float) -> LeaseWork:
    lease = Lease(lease_id=0, prompt_id=0, kind=LeaseKind.TRAINING)
    return LeaseWork(lease=lease, completions=[completion(reward) for reward in rewards])


def test_a_passing_and_a_failing_completion_are_shown_in_turns_and_not_too_often() -> None:
    now_s = 0.0
    choice = SampleChoice(2.0, is_gated=True, clock=lambda: now_s)
    shown: list[float | None] = []
    for now_s in (0.0, 1.9, 2.0, 4.0, 6.0, 8.0):
        chosen = choice.choose(work(0.0, 1.0, 0.0) if now_s < 6 else work(0.0, 0.0))
        shown.append(None if chosen is None else chosen.reward)
    assert shown == [1.0, None, 0.0, 1.0, 0.0, 0.0]
    now_s = 20.0
    assert choice.choose(work()) is None
    assert choice.choose(work(0.5)) is not None


def test_a_sample_says_what_the_contract_of_the_event_asks_for() -> None:
    choice = SampleChoice(1.0, is_gated=True, clock=lambda: 0.0)
    prompt = Prompt(prompt_id=8, text="p" * 9000, answer="")
    lease = work(0.0)
    chosen = completion(0.0, cut=True)
    message = choice.message(
        chosen, lease, prompt, Refused(num_passed=0), "c\ud800" * 9000, ActorCounts()
    )
    assert (message.policy_version, message.prompt_id, message.num_tokens) == (5, 8, 2)
    assert (message.decision, message.truncated, message.held_out) == ("screened out", True, False)
    assert (message.is_extracted, message.extracted) == (False, "")
    assert len(message.prompt) == len(message.completion) == MAX_TEXT_CHARS < MAX_TEXT
    assert message.completion.encode().startswith(b"c?c?")


def test_a_long_text_loses_its_middle() -> None:
    text = shortened("a" * 100 + "b" * 1000 + "c" * 100, 200)
    assert len(text) == 200 and text.startswith("a" * 70) and text.endswith("c" * 70)
    assert "(1000 or more characters left out)" in text
    assert shortened("short", 200) == "short"


def sample_events(harness: ServiceHarness) -> list[dict[str, object]]:
    return [dict(event.values) for event in harness.service.events if event.kind == "sample"]


def test_the_service_tells_a_sample_and_counts_it_nowhere(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    counts = harness.counts("actor-1.0")
    before = harness.service.lifecycle.ledger.table(0)
    assert harness.send("actor-1.0", replace(SAMPLE, counts=counts)) == []
    assert harness.send("actor-1.0", replace(SAMPLE, is_extracted=False, counts=counts)) == []
    first, second = sample_events(harness)
    assert set(first) == KEYS
    assert (first["actor"], first["prompt_id"], first["reward"]) == ("actor-1.0", 3, 1.0)
    assert (first["extracted"], second["extracted"]) == ("7", None)
    assert harness.service.lifecycle.ledger.table(0) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": "x" * (MAX_TEXT + 1)}, "prompt has 4097 characters"),
        ({"decision": "thrown away"}, "decision 'thrown away' is not one of"),
        ({"reward": 1.5}, "reward = 1.5 is above 1"),
        ({"reward": float("nan")}, "reward = nan is out of range"),
        ({"num_tokens": 65}, "num_tokens = 65 is more than a completion has"),
        ({"policy_version": 3}, "policy_version = 3 is from the future"),
        ({"prompt_id": -1}, "prompt_id = -1 is out of range"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    sample = replace(SAMPLE, counts=harness.counts("actor-1.0"), **changes)
    [(_, answer)] = harness.send("actor-1.0", sample)
    assert isinstance(answer, m.Rejected) and text in answer.reason
    assert not sample_events(harness)


def test_the_journal_keeps_no_text_of_a_sample_and_replays_no_event(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    folder = tmp_path / "journal"
    machine, _ = open_machine(
        folder, harness.config, lambda _: ServiceHarness(tmp_path).service, life=0
    )
    hello = m.Hello(role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
    machine.message("actor-1.0", replace(hello, number=1), 1.0)
    machine.message("actor-1.0", replace(SAMPLE, completion="secret", number=2), 2.0)
    [event] = [event for event in machine.events if event.kind == "sample"]
    assert event.values["completion"] == "secret"
    assert machine.journal is not None
    machine.journal.write()
    machine.journal.close()
    records = [record for number in segments(folder) for _, record in read_segment(folder, number)]
    assert not any(b"secret" in bytes(frame) for record in records for frame in record.frames)
    recorded = [decode(record.frames) for record in records if record.kind == "message"]
    assert [type(message).__name__ for message in recorded] == ["Hello", "Sample"]
    again, _ = open_machine(
        folder, harness.config, lambda _: ServiceHarness(tmp_path).service, life=0
    )
    assert again.events == []
    assert isinstance(again, StateMachine)
    again.message("actor-1.0", replace(SAMPLE, number=3), 3.0)  # the count goes on after it
    assert [event.kind for event in again.events] == ["sample"]
    assert again.journal is not None
    again.journal.close()


def test_a_whole_run_shows_samples_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(
        str(tmp_path),
        run={"updates": 5},
        actors={"slots": 16, "max_new_tokens": 8},
        evaluate={"every": 2, "num_samples": 2},
    )
    run = Run(config, 2)
    finished = asyncio.run(asyncio.wait_for(run.execute(), 60))
    assert finished.completed
    shown = [event.values for event in run.sink.events if event.kind == "sample"]
    assert shown and all(set(values) == KEYS for values in shown)
    for values in shown:
        assert values["extracted"] == str(values["completion"])[-1:]
        assert values["decision"] in ("continued", "screened out", "evaluated")


def test_a_real_run_leaves_samples_in_its_folder(tmp_path: Path) -> None:
    run = start_train(tmp_path)
    code, _, error = run.finish()
    assert code == 0, error
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert lines and all(set(line) == KEYS | {"kind"} for line in lines)
    assert all(line["completion"].strip() == line["extracted"] for line in lines)
