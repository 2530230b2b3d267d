"""Batch requests without overlap, the size of a round, the target accuracy of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_group
from tests.fakes.service_harness import (
    ServiceHarness,
    evaluated,
    failed,
    kinds,
    screened_out,
    trained,
)

ACTOR = "actor-1.0"


@pytest.fixture
def in_turns(tmp_path: Path) -> ServiceHarness:
    """No overlap, no gate: a round is exactly a batch of two."""
    harness = ServiceHarness(
        tmp_path,
        run={"overlap": False},
        gate={"mode": "off"},
        objective={"screening_samples": "all"},
    )
    harness.pass_baseline(ACTOR)
    return harness


whole_group = partial(make_group, num_screening=0)
"""A group of a run without a gate."""


def leases_in(replies: list[tuple[str, m.Message]]) -> list[m.Leases]:
    return [message for _, message in replies if isinstance(message, m.Leases)]


def refuse(
    harness: ServiceHarness, lease_id: int, num_passed: int = 0
) -> list[tuple[str, m.Message]]:
    return harness.send(ACTOR, screened_out(lease_id, num_passed))


def test_without_overlap_no_lease_is_granted_until_the_learner_waits(
    in_turns: ServiceHarness,
) -> None:
    want = m.WantWork(num_prompts=20, counts=ActorCounts())
    assert leases_in(in_turns.send(ACTOR, want)) == []
    replies = in_turns.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    [leases] = leases_in(replies)
    assert len(leases.lease_ids) == 2


def test_without_overlap_the_batch_waits_for_all_leases(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, run={"overlap": False})
    harness.pass_baseline(ACTOR)
    harness.send(ACTOR, m.WantWork(num_prompts=20, counts=ActorCounts()))
    [leases] = leases_in(harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2)))
    # The expected acceptance rate is one half, so a round is 2 x 1.15 / 0.5, rounded up.
    assert len(leases.lease_ids) == 5
    for lease_id, prompt_id in zip(leases.lease_ids[:4], leases.prompt_ids[:4], strict=True):
        replies = harness.send(ACTOR, make_group(lease_id, prompt_id))
        assert "BatchReady" not in kinds(replies)
        assert leases_in(replies) == []
    replies = refuse(harness, leases.lease_ids[4])
    assert kinds(replies) == ["GroupFinished", "GroupFinished", "BatchReady"]
    assert len(harness.service.lifecycle.groups.buffer) == 2  # the surplus is kept


def test_without_overlap_an_insufficient_round_is_followed_by_another(
    in_turns: ServiceHarness,
) -> None:
    in_turns.send(ACTOR, m.WantWork(num_prompts=20, counts=ActorCounts()))
    [leases] = leases_in(in_turns.send("learner", m.TakeBatch(policy_version=0, num_groups=2)))
    first, second = leases.lease_ids
    assert leases_in(in_turns.send(ACTOR, whole_group(first, leases.prompt_ids[0]))) == []
    [again] = leases_in(in_turns.send(ACTOR, failed(second, "verifier: x")))
    assert len(again.lease_ids) == 1
    replies = in_turns.send(ACTOR, whole_group(again.lease_ids[0], again.prompt_ids[0]))
    assert kinds(replies) == ["GroupFinished", "GroupFinished", "BatchReady"]


def test_without_overlap_the_next_round_waits_for_the_new_weights(in_turns: ServiceHarness) -> None:
    in_turns.send(ACTOR, m.WantWork(num_prompts=20, counts=ActorCounts()))
    [leases] = leases_in(in_turns.send("learner", m.TakeBatch(policy_version=0, num_groups=2)))
    for lease_id, prompt_id in zip(leases.lease_ids, leases.prompt_ids, strict=True):
        in_turns.send(ACTOR, whole_group(lease_id, prompt_id))
    in_turns.send("learner", trained(1, leases.lease_ids, 2, 24))
    assert leases_in(in_turns.send("learner", m.TakeBatch(policy_version=1, num_groups=2))) == []
    applied = m.WeightsApplied(
        policy_version=1, epoch=1, pause_s=0.0, transfer_s=0.0, error="", counts=ActorCounts()
    )
    [granted] = leases_in(in_turns.send(ACTOR, applied))
    assert len(granted.lease_ids) == 2


@pytest.fixture
def at_target(tmp_path: Path) -> Callable[[float], list[tuple[str, m.Message]]]:
    """Messages of the service after its first evaluation (one prompt, passed), by target."""

    def evaluate(target: float) -> list[tuple[str, m.Message]]:
        harness = ServiceHarness(
            tmp_path, run={"stop_at_accuracy": target}, evaluate={"num_samples": 2}
        )
        harness.hello("learner", 0)
        harness.hello(ACTOR, 1)
        leases = harness.lease(1)
        return harness.send(ACTOR, evaluated(leases.lease_ids[0], num_completions=2))

    return evaluate


def test_accuracy_at_the_target_notifies_the_learner(
    at_target: Callable[[float], list[tuple[str, m.Message]]],
) -> None:
    received = [message for peer, message in at_target(0.5) if peer == "learner"]
    assert received == [m.TargetReached(accuracy=0.5, policy_version=0)]


def test_accuracy_below_the_target_does_not(
    at_target: Callable[[float], list[tuple[str, m.Message]]],
) -> None:
    assert "TargetReached" not in kinds(at_target(0.51))


def test_more_passes_than_completions_are_rejected(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline(ACTOR)
    leases = harness.lease(1)
    [(_, reply)] = refuse(harness, leases.lease_ids[0], num_passed=3)
    assert isinstance(reply, m.Rejected)
    assert "3 of 2 completions passed" in reply.reason
