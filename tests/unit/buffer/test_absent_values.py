"""A value without a measurement is None in events and in the summary, never 0."""

from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.actors.lease_result import result_message
from speed_async.actors.rollout import LeaseProgress
from speed_async.buffer.reporting.status import summary_fields
from speed_async.transport import messages as m
from speed_async.transport.groups import validate_group
from speed_async.types import ActorCounts, Lease, LeaseKind
from tests.fakes.buffer_fixtures import make_group
from tests.fakes.service_harness import ServiceHarness, evaluated, screened_out, trained

ACTOR = "actor-1.0"
UNKNOWN_AT_THE_START = (
    "generated_tokens_per_s",
    "trained_tokens_per_s",
    "gate_acceptance",
    "staleness_mean",
    "staleness_max",
    "actors_slots_busy",
    "actors_slots",
    "reward_mean",
    "accuracy",
    "accuracy_version",
    "accuracy_before",
    "eta_s",
    "loop_lag_s",
    "weights/pause_s",
    "weights/pause_max_s",
    "weights/transfer_s",
    "weights/bytes_per_s",
    "weights/lag_max",
    "verifier/scored_tokens_mean",
    "verifier/timeout_tokens_mean",
    "verifier/timeout_length_correlation",
    "truncated/screened_out",
    "truncated/kept",
)


def summary(harness: ServiceHarness, *, final_evaluated: bool) -> dict[str, object]:
    service = harness.service
    return summary_fields(
        service.components, service.validator, 1.0, attempt=0, final_evaluated=final_evaluated
    )


def test_before_any_measurement_no_value_is_zero(tmp_path: Path) -> None:
    values = ServiceHarness(tmp_path).service.present_status(0.0).values
    assert [values[key] for key in UNKNOWN_AT_THE_START] == [None] * len(UNKNOWN_AT_THE_START)
    assert not any(key.startswith("share_") for key in values)


def test_the_summary_of_an_empty_run_has_no_rate_and_no_times(tmp_path: Path) -> None:
    fields = summary(ServiceHarness(tmp_path), final_evaluated=False)
    unknown = (
        "tokens_per_s",
        "gate_acceptance",
        "staleness_mean",
        "staleness_max",
        "accuracy_last",
    )
    assert [fields[key] for key in unknown] == [None] * len(unknown)
    breakdown = fields["breakdown"]
    assert isinstance(breakdown, dict)
    assert breakdown == {"learner": {}, "actors": {}}


def test_the_time_of_the_learner_is_split_by_its_cause(tmp_path: Path) -> None:
    """Updates from before `time/checkpoint_s` have none."""
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline(ACTOR)
    times = {"time/wait_s": 1.0, "time/train_s": 4.0, "time/sync_s": 2.0}
    for version, checkpoint in ((1, {"time/checkpoint_s": 3.0}), (2, {})):
        update = trained(version, [], groups=0, tokens=0)
        harness.send("learner", replace(update, metrics=update.metrics | times | checkpoint))
    breakdown = summary(harness, final_evaluated=False)["breakdown"]
    assert isinstance(breakdown, dict)
    assert breakdown["learner"] == {
        "waiting for groups": 0.0,
        "receiving the batch": 2.0,
        "training": 8.0,
        "publishing weights": 4.0,
        "waiting for checkpoints": 3.0,
    }
    values = harness.service.present_status(1.0).values
    assert values["share_checkpoint"] == pytest.approx(3 / 17)
    assert values["bottleneck"] == "learner"


def test_the_time_of_a_removed_actor_stays_in_the_ledger(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline(ACTOR)
    gauges = {"sampling_s": 2.0, "updating_s": 1.0, "uptime_s": 4.0}
    harness.send(ACTOR, m.ActorReport(counts=harness.counts(ACTOR), gauges=gauges))
    harness.service.begin_attempt(1)
    harness.hello("actor-1.1000", 1, 1000)
    harness.send("actor-1.1000", m.ActorReport(counts=ActorCounts(), gauges=gauges))
    fields = summary(harness, final_evaluated=False)
    actors = {"sampling": 4.0, "taking in weights": 2.0, "idle": 2.0}
    assert fields["breakdown"] == {"learner": {}, "actors": actors}


@pytest.mark.parametrize(("rewards", "mean"), [((1, 0, 0, 0), 0.25), ((0, 0, 0, 0), 0.0)])
def test_without_a_gate_the_reward_is_over_whole_groups_and_there_is_no_acceptance(
    tmp_path: Path, rewards: tuple[float, ...], mean: float
) -> None:
    harness = ServiceHarness(tmp_path, gate={"mode": "off"})
    harness.pass_baseline(ACTOR)
    leases = harness.lease(1)
    group = make_group(leases.lease_ids[0], leases.prompt_ids[0], rewards=rewards, num_screening=0)
    harness.send(ACTOR, group)
    values = harness.service.present_status(1.0).values
    assert (values["reward_mean"], values["gate_acceptance"]) == (mean, None)
    assert summary(harness, final_evaluated=False)["gate_acceptance"] is None


def test_with_a_gate_the_reward_is_over_the_screening_samples(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline(ACTOR)
    leases = harness.lease(2)
    harness.send(ACTOR, screened_out(leases.lease_ids[0]))
    group = make_group(leases.lease_ids[1], leases.prompt_ids[1], rewards=(1, 0, 1, 1))
    harness.send(ACTOR, group)
    values = harness.service.present_status(1.0).values
    assert (values["reward_mean"], values["gate_acceptance"]) == (0.25, 0.5)
    assert validate_group(replace(group, num_screening=0)).screening_pass_rate is None


def test_an_evaluation_of_empty_completions_has_no_versions(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    lease_id = harness.lease(1).lease_ids[0]
    work = LeaseProgress(lease=Lease(lease_id=lease_id, prompt_id=0, kind=LeaseKind.EVALUATION))
    message = result_message(work, None, ActorCounts())
    assert isinstance(message, m.Evaluated)
    harness.send(ACTOR, replace(message, num_completions=1))
    [event] = [event for event in harness.events if event.kind == "evaluation"]
    assert (event.values["oldest_version"], event.values["newest_version"]) == (None, None)


def test_a_run_without_updates_has_no_accuracy_after(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline(ACTOR)
    fields = summary(harness, final_evaluated=True)
    assert (fields["accuracy_before"], fields["accuracy_before_version"]) == (1.0, 0)
    assert fields["accuracy_after"] is None
    assert (fields["accuracy_last"], fields["accuracy_last_version"]) == (1.0, 0)


def test_the_last_measured_accuracy_is_reported_with_its_version(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, evaluate={"every": 2, "max_share": 0.05})
    harness.pass_baseline(ACTOR)
    harness.send("learner", trained(2, [], groups=0, tokens=0))
    published = m.WeightsPublished(
        policy_version=2, epoch=1, transfer_s=0.1, num_bytes=1, error="", missing=[]
    )
    harness.send("learner", published)
    applied = m.WeightsApplied(
        policy_version=2, epoch=1, pause_s=0, transfer_s=0, error="", counts=harness.counts(ACTOR)
    )
    answers = harness.send(ACTOR, applied)
    counts = ActorCounts(tokens_generated=21)  # 1 of the first evaluation, 20 of training
    answers += harness.send(ACTOR, m.WantWork(num_prompts=1, counts=counts))
    leases = next(message for _, message in answers if isinstance(message, m.Leases))
    message = evaluated(leases.lease_ids[0], counts=harness.counts(ACTOR))
    harness.send(ACTOR, replace(message, num_passed=0, oldest_version=2, newest_version=2))
    fields = summary(harness, final_evaluated=False)
    assert (fields["accuracy_last"], fields["accuracy_last_version"]) == (0.0, 2)
    assert fields["accuracy_after"] is None
