"""Diagnoses of a run that cannot learn: when they start, their texts, and when they end."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speed_async.buffer.ledger import MAX_EXAMPLE_CHARS
from speed_async.observability.metrics import Event, Value
from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_group, restored
from tests.fakes.service_harness import ServiceHarness, evaluated, failed, screened_out, trained

ACTOR = "actor-1.0"
NO_GATE: dict[str, Any] = {
    "gate": {"mode": "off"},
    "buffer": {"credits": 64, "capacity_groups": 64},
}
whole_group = partial(make_group, num_screening=0)


class WatchedService(ServiceHarness):
    """A service harness that keeps events, past its first evaluation."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        super().__init__(folder, **sections)
        self.pass_baseline(ACTOR)

    def status(self, seconds: float = 0.5) -> dict[str, Value]:
        """Values of the status event at the tick after `seconds`."""
        self.send(ACTOR, m.WantWork(num_prompts=0, counts=ActorCounts()))  # a heartbeat
        self.events.clear()
        self.wait(seconds)
        return self.last("status").values

    def last(self, kind: str) -> Event:
        return next(event for event in reversed(self.events) if event.kind == kind)

    def diagnoses(self, seconds: float = 0.5) -> str:
        return str(self.status(seconds)["diagnoses"])

    def refuse(self, count: int, *, num_passed: int = 0, num_truncated: int = 0) -> None:
        """Report `count` prompts of two completions that the gate refuses."""
        for _ in range(count):
            self.send(ACTOR, screened_out(self.lease(1).lease_ids[0], num_passed, num_truncated))

    def group(self, rewards: tuple[float, ...] = (1, 0, 0, 1), *, gate: bool = True) -> None:
        leases = self.lease(1)
        make = make_group if gate else whole_group
        self.send(ACTOR, make(leases.lease_ids[0], leases.prompt_ids[0], rewards=rewards))

    def update(self, grad_norm: float, *, skipped: bool = False) -> None:
        version = self.service.policy_version + 1
        message = trained(version, [], groups=0, tokens=0)
        self.send("learner", replace(message, skipped=skipped, metrics={"grad_norm": grad_norm}))


@pytest.fixture
def harness(tmp_path: Path) -> WatchedService:
    return WatchedService(tmp_path)


@pytest.fixture
def ungated(tmp_path: Path) -> WatchedService:
    return WatchedService(tmp_path, **NO_GATE)


def test_a_healthy_run_has_no_diagnosis(tmp_path: Path) -> None:
    harness = WatchedService(tmp_path, buffer={"credits": 64, "capacity_groups": 64})
    for _ in range(20):
        harness.refuse(8, num_passed=2)
        harness.refuse(8)
        harness.group()
        assert harness.diagnoses() == ""
    for _ in range(4):
        harness.update(0.5)
    assert harness.diagnoses() == ""


def test_a_missing_reward_is_diagnosed_within_a_minute_until_rewards_occur(
    harness: WatchedService,
) -> None:
    harness.wait(59)
    harness.refuse(64)
    assert harness.diagnoses(29) == ""
    text = harness.diagnoses(1)
    assert text.startswith("no reward: none of the last 128 completions passed (0 of them were tr")
    assert "since 1m29s (version 0). Change: check in samples.jsonl" in text
    harness.refuse(1, num_passed=1)
    assert harness.diagnoses() == text, "a single passed completion does not end it"
    harness.refuse(1, num_passed=2)
    assert harness.diagnoses() == ""


def test_many_completions_without_a_reward_are_diagnosed_at_once(harness: WatchedService) -> None:
    harness.refuse(256)
    assert harness.diagnoses().startswith("no reward: none of the last 512 completions passed")


def test_truncated_completions_hide_the_diagnoses_they_explain(harness: WatchedService) -> None:
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    harness.refuse(256, num_truncated=2)
    text = harness.diagnoses(25)
    assert text.startswith(
        "completions are truncated: 512 of the last 512 reached a length limit before they "
        "ended, 0 earned a reward"
    )
    assert "raise actors.max_new_tokens (now 64)" in text
    assert "\n" not in text  # neither the missing reward nor the starving gate
    harness.refuse(60, num_passed=1)
    assert "truncated" not in harness.diagnoses()


def test_truncated_completions_of_whole_groups_are_counted(ungated: WatchedService) -> None:
    ungated.wait(31)
    for _ in range(40):
        leases = ungated.lease(1)
        group = whole_group(leases.lease_ids[0], leases.prompt_ids[0])
        ungated.send(ACTOR, replace(group, cut=np.ones(4, np.int32)))
    assert "160 of the last 160 reached a length limit" in ungated.diagnoses(31)
    assert "80 earned a reward" in ungated.diagnoses()


@pytest.mark.parametrize(("num_passed", "change"), [(1, "a wider band"), (2, "harder prompts")])
def test_a_gate_that_starves_the_learner_is_diagnosed_until_enough_prompts_pass(
    tmp_path: Path, num_passed: int, change: str
) -> None:
    harness = WatchedService(tmp_path)
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    harness.refuse(80, num_passed=num_passed)
    assert harness.diagnoses(19) == ""
    text = harness.diagnoses(2)
    assert text.startswith("the gate starves: of the last 80 prompts 0.0% passed (0.0 < pass rate")
    assert change in text
    harness.group()
    harness.group()
    assert harness.diagnoses() == ""


def test_a_low_acceptance_is_no_diagnosis_while_no_learner_waits(harness: WatchedService) -> None:
    harness.refuse(80, num_passed=1)
    assert harness.diagnoses(60) == ""


def test_updates_without_a_gradient_are_diagnosed_and_end_the_run_as_nothing_learned(
    ungated: WatchedService,
) -> None:
    for _ in range(2):
        ungated.group((1, 1, 1, 1), gate=False)
        ungated.update(0.0)
    assert ungated.diagnoses() == ""
    ungated.update(0.0)
    text = ungated.diagnoses()
    assert text.startswith("no signal: the last 3 updates had a gradient of zero (mean pass rate 1")
    assert "Change: harder prompts" in text
    fields = end_run(ungated, "completed")
    assert fields["outcome"] == "nothing_learned"
    assert str(fields["reason"]).startswith(
        "nothing was learned: of 3 updates, 3 had no gradient; no signal: the last 3"
    )
    end = ungated.last("end").values
    assert (end["outcome"], end["ok"], end["reason"]) == (
        "nothing_learned",
        False,
        fields["reason"],
    )


def test_equal_rewards_are_diagnosed_before_the_first_update(ungated: WatchedService) -> None:
    for _ in range(4):
        ungated.group((1, 1, 1, 1), gate=False)
    assert "in each of the last 4 groups all rewards were equal" in ungated.diagnoses()
    ungated.group(gate=False)
    assert ungated.diagnoses() == ""


@pytest.mark.parametrize("advantage", ["shrunken", "batch"])
def test_equal_rewards_within_groups_are_a_signal_if_groups_are_compared(
    tmp_path: Path, advantage: str
) -> None:
    harness = WatchedService(tmp_path, objective={"advantage": advantage}, **NO_GATE)
    for reward in (1, 0, 1, 0):
        harness.group((reward,) * 4, gate=False)
    assert harness.diagnoses() == ""
    for _ in range(4):
        harness.group((0,) * 4, gate=False)
    assert "in each of the last 4 groups all rewards were equal" in harness.diagnoses()


def test_one_update_with_a_gradient_makes_a_completed_run(ungated: WatchedService) -> None:
    ungated.update(0.0)
    ungated.update(0.25)
    ungated.update(0.0)
    assert end_run(ungated, "completed")["outcome"] == "completed"


def test_a_run_of_skipped_updates_learned_nothing(ungated: WatchedService) -> None:
    for _ in range(3):
        ungated.update(1.0, skipped=True)
    assert ungated.diagnoses().startswith("updates are not finite: 3 of the last 3 were skipped")
    fields = end_run(ungated, "completed")
    assert fields["outcome"] == "nothing_learned"
    assert "3 had numbers that are not finite and were skipped" in str(fields["reason"])


@pytest.mark.parametrize(("updates", "outcome"), [(0, "completed"), (2, "stopped")])
def test_a_run_without_updates_and_a_stopped_one_are_not_nothing_learned(
    ungated: WatchedService, updates: int, outcome: str
) -> None:
    for _ in range(updates):
        ungated.update(0.0)
    fields = end_run(ungated, outcome)
    assert fields["outcome"] == outcome
    assert ungated.last("end").values["ok"] is (outcome == "completed")


def test_a_run_resumed_from_a_checkpoint_alone_may_have_learned_before(
    ungated: WatchedService,
) -> None:
    ungated.send(
        "learner",
        m.Resumed(
            policy_version=7,
            service_sequence=0,
            groups_trained=0,
            completions_trained=0,
            tokens_trained=0,
            recent_lease_ids=[],
        ),
    )
    ungated.update(0.0)
    assert end_run(ungated, "completed")["outcome"] == "completed"


def test_a_lasting_drop_of_the_reward_is_diagnosed_with_its_best(harness: WatchedService) -> None:
    for _ in range(128):
        harness.refuse(2, num_passed=1)
        harness.status()
    harness.update(0.5)
    harness.refuse(128)
    harness.refuse(30, num_passed=1)
    assert "collapsed" not in harness.diagnoses()
    harness.refuse(200)
    assert harness.diagnoses().startswith(
        "reward collapsed: the mean pass rate fell from 0.500 (version 0) to 0.0"
    )
    harness.refuse(256, num_passed=1)
    assert "collapsed" not in harness.diagnoses()


def test_failing_prompts_are_diagnosed_with_the_first_example(harness: WatchedService) -> None:
    for number in range(20):
        lease = harness.lease(1).lease_ids[0]
        reason = f"prompt: the prompt has {500 + number} tokens and the context holds 96"
        harness.send(ACTOR, failed(lease, reason))
    text = harness.diagnoses()
    assert text.startswith(
        "prompts fail: 20 of the last 20 training prompts gave no result; 20 times, for example: "
        "prompt: the prompt has 500 tokens and the context holds 96, since "
    )
    harness.refuse(128, num_passed=1)
    harness.refuse(60, num_passed=1)
    assert harness.diagnoses() == ""


def test_drained_and_stale_leases_are_no_failing_prompts(harness: WatchedService) -> None:
    for reason in [m.DRAINED, m.STALE] * 10:
        harness.send(ACTOR, failed(harness.lease(1).lease_ids[0], reason))
    assert harness.diagnoses() == ""


def test_failing_held_out_prompts_are_diagnosed_because_they_lower_the_accuracy(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path, num_held_out=32)
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    for number, lease_id in enumerate(harness.lease(32).lease_ids):
        message: m.Message = evaluated(lease_id)
        if number == 0:
            message = failed(lease_id, "prompt: too long")
        elif number == 16:
            message = replace(evaluated(lease_id), num_passed=0, num_unscored=1)
        harness.send(ACTOR, message)
    harness.wait(0.5)
    text = str(harness.events[-1].values["diagnoses"])
    assert text.startswith("held-out prompts fail: 2 of the last 32 have completions")
    assert "for example: prompt: too long" in text


def test_the_stall_error_names_the_failure_and_not_the_timeout(harness: WatchedService) -> None:
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    for _ in range(3):
        harness.send(ACTOR, failed(harness.lease(1).lease_ids[0], "prompt: it has 500 tokens"))
    for _ in range(25):
        harness.send(ACTOR, m.WantWork(num_prompts=0, counts=ActorCounts()))
        harness.wait(30)
    reason = str(harness.last("end").values["reason"])
    assert "failed groups: 3 x prompt. Remedy: prompts fail, for example: prompt: it has 500" in (
        reason
    )
    assert "raise cluster.stall_timeout_s" not in reason
    assert harness.last("end").values["outcome"] == "failed"


def test_the_first_example_of_each_failure_is_kept_and_bounded(harness: WatchedService) -> None:
    for reason in ("verifier: first", "verifier: second", "x" * 200 + ": " + "y" * 2000):
        harness.send(ACTOR, failed(harness.lease(1).lease_ids[0], reason))
    table = harness.service.lifecycle.ledger.table(0)
    examples = table["failure_examples"]
    assert isinstance(examples, dict)
    assert examples["verifier"] == "verifier: first"
    assert {len(kind) for kind in examples} == {len("verifier"), 100}
    assert max(len(example) for example in examples.values()) == MAX_EXAMPLE_CHARS


def test_all_occurrences_are_in_the_summary_with_their_times(harness: WatchedService) -> None:
    harness.refuse(256)
    harness.status(10)
    harness.status(10)
    harness.refuse(4, num_passed=2)
    harness.status(10)
    [record] = harness.service.diagnoses.record()
    assert record["what"] == "no_reward"
    assert (record["first_s"], record["last_s"], record["times"]) == (10.0, 20.0, 1)
    assert record["active_at_end"] is False
    assert end_run(harness, "stopped")["diagnoses"] == [record]


def test_a_text_is_refreshed_only_when_its_duration_has_doubled(harness: WatchedService) -> None:
    harness.refuse(256)
    texts = [harness.diagnoses(1)]
    for _ in range(90):
        harness.refuse(1, num_truncated=1)
        if (text := harness.diagnoses(1)) != texts[-1]:
            texts.append(text)
    truncated = [text.partition("(")[2].partition(" ")[0] for text in texts]
    assert truncated == ["0", "20", "40", "80"]


def test_a_restored_service_reports_the_same_diagnoses(tmp_path: Path) -> None:
    harness = WatchedService(tmp_path, **NO_GATE)
    for _ in range(3):
        harness.group((1, 1, 1, 1), gate=False)
    for _ in range(3):
        harness.update(0.0)
    text = harness.diagnoses()
    assert text
    other = ServiceHarness(tmp_path, state=restored(harness.service.state), **NO_GATE)
    assert other.service.diagnoses.active == [text]
    assert other.service.diagnoses.nothing_learned() == harness.service.diagnoses.nothing_learned()


def end_run(harness: WatchedService, outcome: str) -> dict[str, object]:
    """The fields of the summary when the learner ends the run with this outcome."""
    version = harness.service.policy_version
    finish = m.FinishRun(
        policy_version=version, evaluate=False, reason=outcome, stopped=outcome == "stopped"
    )
    harness.send("learner", finish)
    counts = harness.counts(ACTOR)
    [(_, summary)] = harness.send(ACTOR, m.Goodbye(counts=counts))
    assert isinstance(summary, m.Summary)
    return summary.fields
