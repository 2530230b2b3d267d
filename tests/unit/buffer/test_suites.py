"""Evaluation suites in the service: leases, order, results, and what the learner learns."""

from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.buffer.evaluations import Evaluations, new_evaluation_states
from speed_async.config.sections.evaluate import EvaluateConfig
from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_suite
from tests.fakes.service_harness import ServiceHarness, evaluated

ACTOR = "actor-1.0"


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """One held-out prompt, and the suite `hard` of three prompts with two completions each."""
    suite = make_suite(tmp_path, "hard", samples=2, every=1)
    return ServiceHarness(
        tmp_path,
        evaluate={"every": 0, "max_share": 0.05, "suites": [suite]},
        suite_sizes={"hard": 3},
    )


def leases_in(replies: list[tuple[str, m.Message]]) -> dict[str, m.Leases]:
    """By suite; "" is training."""
    return {each.suite: each for _, each in replies if isinstance(each, m.Leases)}


def want(harness: ServiceHarness, num_prompts: int) -> dict[str, m.Leases]:
    counts = harness.counts(ACTOR)
    return leases_in(harness.send(ACTOR, m.WantWork(num_prompts=num_prompts, counts=counts)))


def finish(harness: ServiceHarness, leases: m.Leases, *, num_passed: int = 1) -> list[m.Message]:
    """Report all leases, with tokens of version 0 and 1. Returns the messages to the learner."""
    received: list[m.Message] = []
    for lease_id in leases.lease_ids:
        counts = harness.counts(ACTOR)
        counts = replace(counts, tokens_generated=counts.tokens_generated + leases.num_samples)
        message = evaluated(lease_id, num_completions=leases.num_samples, counts=counts)
        newest = harness.service.policy_version
        result = replace(message, num_passed=num_passed, newest_version=newest, num_truncated=1)
        received += [each for peer, each in harness.send(ACTOR, result) if peer == "learner"]
    return received


def generate(harness: ServiceHarness, num_tokens: int) -> None:
    """The actor has generated this many tokens for training in all."""
    evaluated = harness.service.lifecycle.ledger.evaluation.tokens
    counts = ActorCounts(tokens_generated=num_tokens + evaluated)
    harness.send(ACTOR, m.WantWork(num_prompts=0, counts=counts))


def publish(harness: ServiceHarness, version: int) -> list[m.Message]:
    """The learner trains and broadcasts this version. Returns the messages to the learner."""
    harness.service.lifecycle.groups._state.policy_version = version
    publish = m.PublishWeights(
        policy_version=version, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    harness.send("learner", publish)
    applied = m.WeightsApplied(
        policy_version=version,
        epoch=0,
        pause_s=0.0,
        transfer_s=0.0,
        error="",
        counts=harness.counts(ACTOR),
    )
    harness.send(ACTOR, applied)
    published = m.WeightsPublished(
        policy_version=version, epoch=0, transfer_s=0.0, num_bytes=1, error="", missing=[]
    )
    return [each for peer, each in harness.send("learner", published) if peer == "learner"]


def pass_base(harness: ServiceHarness) -> None:
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    leases = want(harness, 4)
    finish(harness, leases["held_out"])
    finish(harness, leases["hard"])


def test_the_base_is_evaluated_first_in_place_of_training(harness: ServiceHarness) -> None:
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    leases = want(harness, 5)
    assert list(leases) == ["held_out", "hard", ""]
    assert {suite: len(each.lease_ids) for suite, each in leases.items()} == {
        "held_out": 1,
        "hard": 3,
        "": 1,
    }
    assert [leases[suite].num_samples for suite in leases] == [1, 2, 0]


def test_a_later_evaluation_has_its_share_of_the_tokens_of_training(
    harness: ServiceHarness,
) -> None:
    pass_base(harness)
    began = publish(harness, 1)
    assert began == [m.EvaluationBegan(suite="hard", policy_version=1)]
    assert list(want(harness, 1)) == [""]
    # A prompt of two completions, which had one token each in the first evaluation.
    generate(harness, 79)
    leases = want(harness, 2)
    assert [len(leases[suite].lease_ids) for suite in ("hard", "")] == [1, 1]
    assert list(want(harness, 1)) == [""]
    finish(harness, leases["hard"])
    assert list(want(harness, 1)) == [""]
    generate(harness, 120)
    assert len(want(harness, 3)["hard"].lease_ids) == 2


def test_an_evaluation_is_not_bounded_while_no_update_can_overlap_it(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, run={"overlap": False}, evaluate={"every": 1})
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    finish(harness, want(harness, 1)["held_out"])
    publish(harness, 1)
    assert len(want(harness, 1)["held_out"].lease_ids) == 1


def test_the_oldest_evaluation_gets_what_is_saved_up_however_long_its_completions_are(
    tmp_path: Path,
) -> None:
    suites = [
        make_suite(tmp_path, "long", samples=4, every=1),
        make_suite(tmp_path, "short", samples=1, every=2),
    ]
    harness = ServiceHarness(
        tmp_path,
        evaluate={"every": 0, "max_share": 0.05, "suites": suites},
        suite_sizes={"long": 1, "short": 1},
    )
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    leases = want(harness, 3)
    for suite in ("held_out", "long", "short"):
        finish(harness, leases[suite])
    publish(harness, 1)
    publish(harness, 2)
    generate(harness, 79)  # 3 tokens are too few for `long`, and `short` needs 1
    assert list(want(harness, 3)) == [""]
    generate(harness, 100)
    assert list(want(harness, 3)) == ["long", "short", ""]


def test_a_result_has_its_suite_its_version_and_the_range_of_versions(
    harness: ServiceHarness,
) -> None:
    pass_base(harness)
    publish(harness, 1)
    generate(harness, 120)
    first = want(harness, 2)["hard"]
    finish(harness, first)
    harness.service.lifecycle.groups._state.policy_version = 2
    [ended] = finish(harness, want(harness, 1)["hard"])
    assert ended == m.EvaluationEnded(suite="hard", policy_version=1, accuracy=0.5)
    [base, result] = [event for event in harness.events if event.kind == "suite"]
    assert base.values["policy_version"] == 0
    shown = {
        "suite": "hard",
        "policy_version": 2,  # the newest of the tokens
        "requested_version": 1,
        "mean": 0.5,
        "num_samples": 2,
        "num_passed": 3,
        "num_completions": 6,
        "num_truncated": 3,
        "oldest_version": 0,
        "newest_version": 2,
    }
    assert {key: result.values[key] for key in shown} == shown
    assert result.values["accuracy_version"] == 0  # of the held-out prompts


def test_the_first_batch_does_not_wait_for_the_suites(harness: ServiceHarness) -> None:
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    leases = want(harness, 4)
    assert harness.service.state.phase == "evaluating"
    finish(harness, leases["held_out"])
    assert harness.service.state.phase == "training"


def test_a_prompt_of_a_suite_has_the_number_of_completions_of_its_suite(
    harness: ServiceHarness,
) -> None:
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    hard = want(harness, 4)["hard"]
    replies = harness.send(ACTOR, evaluated(hard.lease_ids[0], num_completions=1))
    [refusal] = [each for _, each in replies if isinstance(each, m.Rejected)]
    assert refusal.reason == "Evaluated: num_completions = 1, but a prompt of hard has 2"


def test_the_last_version_is_evaluated_by_all_suites(harness: ServiceHarness) -> None:
    pass_base(harness)
    publish(harness, 1)
    generate(harness, 120)
    running = want(harness, 1)["hard"]
    replies = harness.send("learner", m.FinishRun(policy_version=1, evaluate=True, reason="done"))
    assert replies == [("learner", m.EvaluationBegan(suite="held_out", policy_version=1))]
    finish(harness, running)
    leases = want(harness, 4)
    assert list(leases) == ["held_out", "hard"]
    finish(harness, leases["held_out"])
    assert not harness.service.components.evaluations.are_complete(1)
    finish(harness, leases["hard"])
    assert harness.service.components.evaluations.are_complete(1)


def test_a_learner_that_reconnects_learns_the_last_results_and_what_is_running(
    harness: ServiceHarness,
) -> None:
    pass_base(harness)
    publish(harness, 1)
    generate(harness, 120)
    finish(harness, want(harness, 2)["hard"])
    finish(harness, want(harness, 1)["hard"], num_passed=2)
    publish(harness, 2)
    replies = harness.hello("learner", 0)
    assert [each for _, each in replies][1:] == [
        m.EvaluationEnded(suite="hard", policy_version=1, accuracy=4 / 6),
        m.EvaluationBegan(suite="hard", policy_version=2),
    ]


def test_the_suite_with_the_oldest_version_is_leased_first() -> None:
    config = EvaluateConfig.model_validate(
        {
            "every": 1,
            "suites": [
                {"name": "often", "path": "p", "every": 1},
                {"name": "seldom", "path": "p", "every": 2},
            ],
        }
    )
    sizes = {"held_out": 1, "often": 1, "seldom": 1}
    states = new_evaluation_states(config, sizes)
    evaluations = Evaluations(config, sizes, states)
    for plan in evaluations.plans:
        plan.next_prompt()
        plan.record(1, 1, 0, 0)
    evaluations.start_due(2)
    for name in ("held_out", "often"):
        evaluations.of(name).next_prompt()
        evaluations.of(name).record(0, 1, 2, 2)
    evaluations.start_due(3)
    assert [plan.suite for plan in evaluations.leasable()] == ["seldom", "held_out", "often"]
    results = evaluations.of("often").results
    assert results is not None
    versions = [each.policy_version for each in (results.first, results.last, results.best)]
    assert versions == [0, 2, 0]


def test_an_unfinished_evaluation_is_not_restarted_by_a_later_version() -> None:
    config = EvaluateConfig(every=1)
    states = new_evaluation_states(config, {"held_out": 1})
    evaluations = Evaluations(config, {"held_out": 1}, states)
    assert evaluations.start_due(1) == []
    assert evaluations.held_out.target_version == 0


def test_the_accuracy_that_ends_a_run_is_credited_to_the_newest_version_that_sampled_it(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(
        tmp_path, run={"stop_at_accuracy": 0.5}, evaluate={"every": 1, "max_share": 0.05}
    )
    harness.hello("learner", 0)
    harness.hello(ACTOR, 1)
    finish(harness, want(harness, 1)["held_out"], num_passed=0)
    publish(harness, 1)
    generate(harness, 20)
    leases = want(harness, 1)["held_out"]
    harness.service.lifecycle.groups._state.policy_version = 3
    [ended, reached] = finish(harness, leases)
    assert ended == m.EvaluationEnded(suite="held_out", policy_version=1, accuracy=1.0)
    assert reached == m.TargetReached(accuracy=1.0, policy_version=3)
    assert harness.events[-1].values["accuracy_version"] == 3
