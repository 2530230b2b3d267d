"""The buffer service: leases, credits, staleness, evaluation, group ends and the ledger."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speed_async.buffer.membership import RECONNECT_S, SILENT_LINK_S
from speed_async.buffer.reporting.scoring import scoring_summary
from speed_async.environments.outcome_lengths import OutcomeLengths
from speed_async.transport import messages as m
from speed_async.types import ActorCounts, GroupEnd
from tests.fakes.buffer_fixtures import make_group
from tests.fakes.service_harness import (
    ServiceHarness,
    evaluated,
    failed,
    kinds,
    screened_out,
    trained,
)


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    return ServiceHarness(tmp_path)


def test_first_evaluation_precedes_the_first_training_batch(harness: ServiceHarness) -> None:
    harness.hello("learner", 0)
    harness.hello("actor-1.0", 1)
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    [(_, first)] = harness.send("actor-1.0", m.WantWork(num_prompts=1, counts=ActorCounts()))
    assert isinstance(first, m.Leases)
    assert first.kind == "evaluation"
    leases = harness.lease(2)
    for lease_id, prompt_id in zip(leases.lease_ids, leases.prompt_ids, strict=True):
        assert "BatchReady" not in kinds(harness.send("actor-1.0", make_group(lease_id, prompt_id)))
    replies = harness.send(
        "actor-1.0",
        evaluated(first.lease_ids[0]),
    )
    assert kinds(replies) == ["GroupFinished", "GroupFinished", "BatchReady"]


def test_credits_are_charged_at_the_grant_and_returned_when_the_group_ends(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 9})
    harness.pass_baseline()
    leases = harness.lease(20)
    # Before any screening, half of the prompts are expected to pass: 9 / 2 + 3 * sqrt(9 / 4) = 9.
    assert len(leases.lease_ids) == 9
    # The actor still requests 11. A screened-out prompt ends one lease and lowers the expected
    # yield to 8 of 17, so 9.4 leases may be open: one more is granted.
    replies = harness.send(
        "actor-1.0",
        screened_out(leases.lease_ids[0]),
    )
    [refill] = [message for _, message in replies if isinstance(message, m.Leases)]
    assert len(refill.lease_ids) == 1
    # A buffered group keeps its credit.
    replies = harness.send("actor-1.0", make_group(leases.lease_ids[1], leases.prompt_ids[1]))
    assert kinds(replies) == []


def test_duplicate_result_counts_once(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    leases = harness.lease(1)
    group = make_group(leases.lease_ids[0], leases.prompt_ids[0])
    assert kinds(harness.send("actor-1.0", group)) == []
    assert kinds(harness.send("actor-1.0", group)) == []
    assert harness.service.lifecycle.ledger.buffered.groups == 1


def test_every_end_is_counted_and_the_ledger_balances(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 9})
    harness.pass_baseline()
    leases = harness.lease(6)
    ids, prompts = leases.lease_ids, leases.prompt_ids
    generated = 1  # of the first evaluation

    def counts(ended: int) -> ActorCounts:
        return ActorCounts(groups_leased=7, groups_in_flight=6 - ended, tokens_generated=generated)

    for ended, (lease_id, prompt_id) in enumerate(zip(ids[:3], prompts[:3], strict=True), 1):
        generated += 12
        harness.send("actor-1.0", make_group(lease_id, prompt_id, counts=counts(ended)))
    generated += 6
    harness.send(
        "actor-1.0",
        m.ScreenedOut(
            lease_id=ids[3],
            num_passed=2,
            num_completions=2,
            num_truncated=0,
            num_tokens=6,
            counts=counts(4),
        ),
    )
    generated += 5
    harness.send(
        "actor-1.0",
        m.LeaseFailed(
            lease_id=ids[4], reason="verifier: x", num_completions=2, num_tokens=5, counts=counts(5)
        ),
    )
    replies = harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    ready = replies[-1][1]
    assert isinstance(ready, m.BatchReady)
    harness.send("learner", trained(1, ready.lease_ids, groups=2, tokens=24))
    # Version 2: the third group (version 0) is now older than max_staleness = 1.
    harness.send("learner", trained(2, [], groups=2, tokens=24))
    assert harness.ends() == {
        "trained": (2, 24),
        "stale": (1, 12),
        "screened_out": (1, 6),
        "failed": (1, 5),
    }
    ledger = harness.service.lifecycle.ledger
    assert ledger.checks(harness.service.lifecycle.leases.num_training) == dict.fromkeys(
        ledger.checks(1), True
    )
    assert ledger.failures == {"verifier": 1}


def test_unaccounted_token_violates_the_ledger_invariants(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    leases = harness.lease(1)
    lost_one = ActorCounts(groups_leased=2, groups_in_flight=0, tokens_generated=1 + 12 + 1)
    harness.send(
        "actor-1.0", make_group(leases.lease_ids[0], leases.prompt_ids[0], counts=lost_one)
    )
    checks = harness.service.lifecycle.ledger.checks(0)
    assert [name for name, holds in checks.items() if not holds] == [
        "tokens: engines' generated = ended + evaluation + held",
        "actors: own counts = what the service received",
    ]


def test_group_that_arrives_stale_ends_immediately(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    leases = harness.lease(1)
    harness.send("learner", trained(2, [], groups=0, tokens=0))
    harness.send("actor-1.0", make_group(leases.lease_ids[0], leases.prompt_ids[0], version=0))
    assert harness.ends() == {"stale": (1, 12)}


def test_silent_actor_is_lost_and_its_prompts_are_requeued(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    leases = harness.lease(2)
    harness.wait(harness.config.cluster.peer_timeout_s + 1)
    assert harness.ends() == {"failed": (2, 0)}
    assert harness.service.lifecycle.ledger.checks(0) == dict.fromkeys(
        harness.service.lifecycle.ledger.checks(0), True
    )
    harness.hello("actor-1.1", 1, incarnation=1)
    again = harness.lease(2, "actor-1.1")
    assert sorted(again.prompt_ids) == sorted(leases.prompt_ids)
    # The lost incarnation resumes: its message is rejected and does not count.
    [(peer, reply)] = harness.send(
        "actor-1.0", make_group(leases.lease_ids[0], leases.prompt_ids[0])
    )
    assert peer == "actor-1.0"
    assert isinstance(reply, m.Rejected)


def test_new_incarnation_replaces_the_old_one_immediately(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.lease(3)
    replies = harness.hello("actor-1.1", 1, incarnation=1)
    assert kinds(replies) == ["Welcome"]
    assert harness.ends() == {"failed": (3, 0)}


def test_group_with_wrong_prompt_or_size_ends_as_failed(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.hello("actor-2.0", 2)
    leases = harness.lease(1)
    others = harness.lease(1, "actor-2.0")
    wrong_prompt = make_group(leases.lease_ids[0], leases.prompt_ids[0] + 1)
    assert kinds(harness.send("actor-1.0", wrong_prompt))[:1] == ["Rejected"]
    wrong_size = make_group(others.lease_ids[0], others.prompt_ids[0], rewards=(1, 0))
    assert kinds(harness.send("actor-2.0", wrong_size))[:1] == ["Rejected"]
    assert harness.ends() == {"failed": (2, 0)}  # both actors are lost; the groups do not count


def test_hello_with_other_task_data_is_rejected(harness: ServiceHarness) -> None:
    hello = m.Hello(role="actor", index=1, incarnation=0, fingerprint="other", process_id=1)
    [(_, reply)] = harness.send("actor-1.0", hello)
    assert isinstance(reply, m.Rejected)
    assert "same config and data" in reply.reason


def test_hello_with_another_model_folder_is_rejected(harness: ServiceHarness) -> None:
    hello = m.Hello(
        role="actor",
        index=1,
        incarnation=0,
        fingerprint="f",
        process_id=1,
        model_fingerprint="other",
    )
    [(_, reply)] = harness.send("actor-1.0", hello)
    assert isinstance(reply, m.Rejected)
    assert (
        "give every node the same model, tokenizer, chat template and section [model]"
        in reply.reason
    )


def test_offers_have_ordered_ranks_and_only_new_members_open_an_epoch(
    harness: ServiceHarness,
) -> None:
    harness.hello("learner", 0)
    harness.hello("actor-2.0", 2)
    harness.hello("actor-1.0", 1)
    publish = m.PublishWeights(
        policy_version=1, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    replies = harness.send("learner", publish)
    offers = {peer: each.offer for peer, each in replies if isinstance(each, m.OfferWeights)}
    assert {peer: (offer.rank, offer.world_size) for peer, offer in offers.items()} == {
        "actor-1.0": (1, 3),
        "actor-2.0": (2, 3),
    }
    members = replies[-1][1]
    assert isinstance(members, m.WeightMembers)
    first_epoch = members.epoch

    def epoch() -> int:
        message = harness.send("learner", publish)[-1][1]
        assert isinstance(message, m.WeightMembers)
        return message.epoch

    assert epoch() == first_epoch
    harness.hello("actor-3.0", 3)
    assert epoch() == first_epoch + 1
    failed = m.WeightsPublished(
        policy_version=1, epoch=first_epoch + 1, transfer_s=0.0, num_bytes=0, error="x", missing=[]
    )
    harness.send("learner", failed)
    assert epoch() == first_epoch + 2


def test_shutdown_evaluates_drains_and_sends_the_summary(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    applied = m.WeightsApplied(
        policy_version=2, epoch=1, pause_s=0, transfer_s=0, error="", counts=ActorCounts()
    )
    finish = m.FinishRun(policy_version=2, evaluate=True, reason="completed")
    harness.send("learner", trained(2, [], groups=0, tokens=0))
    assert kinds(harness.send("learner", finish)) == ["EvaluationBegan"]
    # Only an actor that holds version 2 may evaluate it.
    assert kinds(harness.send("actor-1.0", m.WantWork(num_prompts=4, counts=ActorCounts()))) == []
    [(_, leases)] = harness.send("actor-1.0", applied)
    assert isinstance(leases, m.Leases)
    assert (leases.kind, len(leases.lease_ids)) == ("evaluation", 1)
    done = m.Evaluated(
        lease_id=leases.lease_ids[0],
        num_passed=0,
        num_completions=1,
        num_truncated=0,
        num_tokens=2,
        oldest_version=2,
        newest_version=2,
        counts=ActorCounts(groups_leased=2, tokens_generated=3),
    )
    assert kinds(harness.send("actor-1.0", done)) == ["EvaluationEnded", "Drain"]
    goodbye = m.Goodbye(counts=ActorCounts(groups_leased=2, tokens_generated=3))
    [(peer, summary)] = harness.send("actor-1.0", goodbye)
    assert peer == "learner"
    assert isinstance(summary, m.Summary)
    assert summary.fields["accuracy_before"] == 1.0
    assert summary.fields["accuracy_after"] == 0.0
    ledger = summary.fields["ledger"]
    assert isinstance(ledger, dict)
    assert ledger["closes"] is True
    assert harness.service.ended


def test_the_last_evaluation_ends_by_silence_and_not_by_its_duration(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    finish = m.FinishRun(policy_version=2, evaluate=True, reason="completed")
    harness.send("learner", trained(2, [], groups=0, tokens=0))
    harness.send("learner", finish)
    applied = m.WeightsApplied(
        policy_version=2, epoch=1, pause_s=0, transfer_s=0, error="", counts=ActorCounts()
    )
    harness.send("actor-1.0", applied)
    harness.lease(1)
    before, stall_s = harness.counts("actor-1.0"), harness.config.cluster.stall_timeout_s
    waited_s, notices = 0, 0
    generating = before
    while waited_s < 3 * stall_s:  # of one suite
        waited_s += 30
        generating = replace(
            before,
            tokens_generated=before.tokens_generated + waited_s,
            tokens_in_flight=before.tokens_in_flight + waited_s,
        )
        harness.send("actor-1.0", m.ActorReport(gauges={}, counts=generating))
        replies = harness.wait(30)
        assert "Drain" not in kinds(replies)
        notices += ("learner", m.EvaluationPending()) in replies
    assert notices == 12  # four within each timeout, so that the learner's own never expires
    silent_s, replies = 30, []  # the last report with new tokens came before the last tick
    while "Drain" not in kinds(replies):
        report = m.ActorReport(gauges={}, counts=generating)
        replies = harness.send("actor-1.0", report) + harness.wait(30)
        silent_s += 30
    assert silent_s == stall_s
    assert ("learner", m.EvaluationPending()) not in harness.wait(
        harness.config.cluster.drain_timeout_s
    )


def test_actor_that_does_not_drain_is_lost_after_the_deadline(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.lease(2)
    stop = m.FinishRun(policy_version=0, evaluate=False, reason="stopped")
    assert kinds(harness.send("learner", stop)) == ["Drain"]
    assert harness.wait(harness.config.cluster.drain_timeout_s - 1) == []
    assert kinds(harness.wait(2)) == ["Summary"]
    assert harness.ends() == {str(GroupEnd.FAILED): (2, 0)}


def test_failure_aborts_every_other_role_and_ends_the_service(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.hello("actor-2.0", 2)
    replies = harness.send("actor-1.0", m.Failure(role="actor-1", message="broken"))
    assert [(peer, type(message)) for peer, message in replies] == [
        ("actor-2.0", m.Abort),
        ("learner", m.Abort),
    ]
    assert harness.service.ended


def test_learner_messages_from_other_peers_are_rejected(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    [(_, reply)] = harness.send("actor-1.0", m.TakeBatch(policy_version=0, num_groups=1))
    assert isinstance(reply, m.Rejected)
    [(_, reply)] = harness.send("unknown", m.WantWork(num_prompts=1, counts=ActorCounts()))
    assert isinstance(reply, m.Rejected)


def published(version: int, error: str = "") -> m.WeightsPublished:
    return m.WeightsPublished(
        policy_version=version, epoch=0, transfer_s=0.0, num_bytes=0, error=error, missing=[]
    )


def test_failed_prompt_is_skipped_until_its_next_epoch(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    seen = []
    for _ in range(99):
        leases = harness.lease(1)
        seen += leases.prompt_ids
        harness.send(
            "actor-1.0",
            failed(leases.lease_ids[0], "verifier: raised"),
        )
    assert len(set(seen)) == 99


def test_failed_held_out_prompt_counts_as_not_passed(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, num_held_out=2)
    harness.hello("learner", 0)
    harness.hello("actor-1.0", 1)
    leases = harness.lease(2)
    assert leases.kind == "evaluation"
    harness.send(
        "actor-1.0",
        failed(leases.lease_ids[0], "prompt: too long"),
    )
    harness.send(
        "actor-1.0",
        evaluated(leases.lease_ids[1]),
    )
    [done] = [event for event in harness.events if event.kind == "evaluation"]
    assert (done.values["num_passed"], done.values["num_completions"]) == (1, 2)


def test_undelivered_weights_are_offered_again_in_a_new_epoch(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    publish = m.PublishWeights(
        policy_version=1, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    harness.send("learner", publish)
    epoch = harness.service.state.weight_group.epoch

    def failed(epoch: int) -> m.WeightsApplied:
        return m.WeightsApplied(
            policy_version=-1,
            epoch=epoch,
            pause_s=0,
            transfer_s=0,
            error="connection lost",
            counts=ActorCounts(),
        )

    assert kinds(harness.send("actor-1.0", failed(epoch))) == ["MembershipChanged"]
    harness.send("learner", publish)
    assert harness.service.state.weight_group.epoch == epoch + 1
    # A late message about the old group does not affect the new one.
    assert kinds(harness.send("actor-1.0", failed(epoch))) == []
    harness.send("learner", publish)
    assert harness.service.state.weight_group.epoch == epoch + 1


def test_actor_with_unusable_weights_is_lost_immediately_with_a_warning(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.lease(2)
    publish = m.PublishWeights(
        policy_version=1, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    harness.send("learner", publish)
    harness.events.clear()
    refused = m.WeightsApplied(
        policy_version=-1,
        epoch=harness.service.state.weight_group.epoch,
        pause_s=0,
        transfer_s=0,
        error="policy version 1 is refused, its canary failed",
        usable=False,
        counts=harness.counts("actor-1.0"),
    )
    assert kinds(harness.send("actor-1.0", refused)) == []
    assert harness.ends() == {"failed": (2, 0)}
    [event] = harness.events
    assert (event.kind, event.values["actors_alive"]) == ("status", 0)
    warning = "actor-1.0 did not apply the weights: policy version 1 is"
    assert warning in str(event.values["warning"])
    # The learner does not wait for the lost actor, and its next incarnation gets the weights.
    [(_, members)] = harness.send("learner", publish)
    assert isinstance(members, m.WeightMembers) and members.actor_names == []
    harness.hello("actor-1.1", 1, incarnation=1)
    offered = kinds(harness.send("learner", publish))
    assert offered == ["OfferWeights", "WeightMembers"]


def test_undelivered_weights_raise_a_warning_immediately(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.events.clear()
    failed = m.WeightsApplied(
        policy_version=-1,
        epoch=99,
        pause_s=0,
        transfer_s=0,
        error="connection lost",
        counts=harness.counts("actor-1.0"),
    )
    harness.send("actor-1.0", failed)
    [event] = harness.events
    assert event.values["warning"] == "actor-1.0 did not apply the weights: connection lost"
    assert event.values["actors_alive"] == 1


def test_republished_version_is_not_evaluated_again(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, evaluate={"every": 1})
    harness.pass_baseline()
    harness.send("learner", published(0))
    leases = harness.lease(1)
    assert leases.kind == "training"


def test_actor_that_joins_during_shutdown_receives_drain(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.send("learner", m.FinishRun(policy_version=0, evaluate=False, reason="stopped"))
    assert kinds(harness.hello("actor-2.0", 2)) == ["Welcome", "Drain"]


def test_actor_that_does_not_reconnect_is_lost(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.lease(2)
    harness.service.gone("actor-1.0", harness.now_s)
    harness.wait(RECONNECT_S - 1)
    assert harness.ends() == {}
    harness.wait(2)
    assert harness.ends() == {"failed": (2, 0)}


def test_actor_that_reconnects_is_kept(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    harness.lease(2)
    harness.service.gone("actor-1.0", harness.now_s)
    harness.wait(RECONNECT_S - 1)
    harness.send("actor-1.0", m.WantWork(num_prompts=0, counts=harness.counts("actor-1.0")))
    harness.wait(RECONNECT_S - 1)
    assert harness.ends() == {}


def test_actor_behind_a_silent_network_is_kept_until_the_peer_timeout(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.lease(2)
    harness.wait(SILENT_LINK_S + 1)
    harness.service.gone("actor-1.0", harness.now_s)
    harness.wait(harness.config.cluster.peer_timeout_s - SILENT_LINK_S - 2)
    assert harness.ends() == {}
    harness.wait(2)
    assert harness.ends() == {"failed": (2, 0)}


def test_stalled_batch_ends_the_run_with_the_reason(harness: ServiceHarness) -> None:
    harness.pass_baseline()
    leases = harness.lease(1)
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    harness.send(
        "actor-1.0",
        screened_out(leases.lease_ids[0]),
    )
    harness.wait(harness.config.cluster.peer_timeout_s - 1)
    harness.send("actor-1.0", m.WantWork(num_prompts=0, counts=ActorCounts()))
    replies: list[tuple[str, m.Message]] = []
    while not harness.service.ended:
        replies = harness.wait(30)
        harness.send("actor-1.0", m.WantWork(num_prompts=0, counts=ActorCounts()))
    [abort] = [message for peer, message in replies if peer == "learner"]
    assert isinstance(abort, m.Abort)
    assert "1 prompts screened; 0 passed the gate" in abort.message
    assert "easier prompts" in abort.message


def end_reason(harness: ServiceHarness) -> str:
    [end] = [event for event in harness.events if event.kind == "end"]
    return str(end.values["reason"])


def test_a_batch_of_long_completions_is_no_stall_while_tokens_arrive(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.lease(1)
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    before, waited_s, notices = harness.counts("actor-1.0"), 0, 0
    generating = before
    while waited_s < 3 * harness.config.cluster.stall_timeout_s:
        waited_s += 30
        generating = replace(
            before,
            tokens_generated=before.tokens_generated + waited_s,
            tokens_in_flight=before.tokens_in_flight + waited_s,
        )
        harness.send("actor-1.0", m.ActorReport(gauges={}, counts=generating))
        replies = harness.wait(30)
        notices += ("learner", m.BatchPending()) in replies
    assert not harness.service.ended
    assert notices == 12  # four within each timeout, so that the learner's own never expires
    silent_s = 0
    while not harness.service.ended:
        harness.send("actor-1.0", m.ActorReport(gauges={}, counts=generating))
        harness.wait(30)
        silent_s += 30
    assert silent_s == harness.config.cluster.stall_timeout_s
    assert "no token was generated for 600 s" in end_reason(harness)


def test_tokens_without_any_usable_prompt_are_a_stall(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 4})
    harness.pass_baseline()
    harness.send("learner", m.TakeBatch(policy_version=0, num_groups=2))
    for _ in range(4):
        leases, before = harness.lease(1), harness.counts("actor-1.0")
        counts = replace(before, tokens_generated=before.tokens_generated + 6)
        harness.send("actor-1.0", replace(screened_out(leases.lease_ids[0]), counts=counts))
    while not harness.service.ended:
        before = harness.counts("actor-1.0")
        counts = replace(
            before,
            tokens_generated=before.tokens_generated + 1,
            tokens_in_flight=before.tokens_in_flight + 1,
        )
        harness.send("actor-1.0", m.ActorReport(gauges={}, counts=counts))
        harness.wait(30)
    reason = end_reason(harness)
    assert "none of the last 4 prompts entered the buffer, for 600 s" in reason


def test_backpressure_starts_before_the_memory_limit(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 100, "capacity_groups": 200})
    harness.pass_baseline()
    leases = harness.lease(100)
    credits_before = harness.service.lifecycle.credits_left()
    buffer = harness.config.buffer.model_copy(update={"capacity_bytes": 1000})
    harness.service.lifecycle.credit._config = harness.config.model_copy(  # pyright: ignore
        update={"buffer": buffer}
    )
    for lease_id, prompt_id in zip(leases.lease_ids[:40], leases.prompt_ids[:40], strict=True):
        harness.send("actor-1.0", make_group(lease_id, prompt_id))  # 152 bytes each
    lifecycle = harness.service.lifecycle
    assert credits_before > 0
    assert lifecycle.credits_left() == 0


def test_an_actor_that_lags_is_limited_by_staleness_and_not_by_few_credits(tmp_path: Path) -> None:
    many = {"max_staleness": 1000, "credits": 8}
    for buffer, lag, expected in (({"max_staleness": 2}, 2, 2), (many, 500, 8), (many, 999, 4)):
        gate = {"mode": "off", "n_init": 2, "n_cont": 2}
        learner = {"groups_per_update": 2}
        harness = ServiceHarness(tmp_path, gate=gate, buffer=buffer, learner=learner)
        harness.pass_baseline()
        assert harness.service.lifecycle.credits_left(lag) == expected


def test_expired_lease_is_requeued_and_its_late_result_counts_once(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path, buffer={"lease_timeout_s": 10.0})
    harness.pass_baseline()
    leases = harness.lease(1)
    [lease_id], [prompt_id] = leases.lease_ids, leases.prompt_ids
    charged = harness.service.lifecycle.leases.num_charged
    harness.wait(11)
    assert harness.service.lifecycle.leases.num_charged == charged - 1
    assert "leases expired" in harness.service.warning
    assert harness.lease(1).prompt_ids[0] == prompt_id  # granted to the next request
    group = make_group(lease_id, prompt_id)
    harness.send("actor-1.0", group)
    harness.send("actor-1.0", group)
    assert len(harness.service.lifecycle.groups.buffer) == 1


def test_suspended_service_does_not_time_out_its_peers(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.lease(1)
    suspended_s = 2 * harness.config.cluster.peer_timeout_s
    harness.now_s += suspended_s
    harness.record(harness.service.tick(harness.now_s, loop_lag_s=suspended_s))
    assert [state.name for state in harness.service.membership.present()] == ["actor-1.0"]
    harness.wait(harness.config.cluster.peer_timeout_s + 1)  # without messages
    assert harness.service.membership.present() == ()


def test_recovery_notes_precede_later_warnings(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    harness.service.warnings.show_first("the journal's tail was damaged")
    harness.service.refused("actor-1.0", "malformed", harness.now_s)
    harness.wait(0.1)
    warning = harness.events[-1].values["warning"]
    assert warning == (
        "the journal's tail was damaged\nactor-1 is lost: its message was refused: malformed; its "
        "supervisor restarts it"
    )


def test_truncation_and_outcomes_of_the_verifier_are_in_events_and_summary(
    harness: ServiceHarness,
) -> None:
    harness.pass_baseline()
    leases = harness.lease(2)
    counts = replace(harness.counts("actor-1.0"), tokens_generated=1 + 6 + 12)
    rejected = screened_out(leases.lease_ids[0], num_passed=2, num_truncated=1)
    harness.send("actor-1.0", replace(rejected, num_truncated_passed=1, counts=counts))
    group = make_group(leases.lease_ids[1], leases.prompt_ids[1], counts=counts)
    harness.send("actor-1.0", replace(group, cut=np.array([1, 0, 1, 0], np.int32)))
    lengths = OutcomeLengths()
    for num_tokens in (2, 4):
        lengths.add("scored", num_tokens)
    lengths.add("timeout", 9)
    gauges = lengths.sums | {"reward/bonus": 0.25}
    harness.send("actor-1.0", m.ActorReport(gauges=gauges, counts=counts))
    values = harness.service.present_status(1.0).values
    assert (values["truncated/screened_out"], values["truncated/screened_out_passed"]) == (0.5, 1)
    assert (values["truncated/kept"], values["truncated/kept_passed"]) == (0.5, 1)
    assert (values["verifier/timeouts"], values["verifier/errors"]) == (1, 0)
    assert values["verifier/timeout_tokens_mean"] == 9.0
    assert values["verifier/timeout_length_correlation"] == lengths.length_correlation("timeout")
    assert values["reward/bonus"] == 0.25
    lifecycle, statistics = harness.service.lifecycle, harness.service.statistics
    fields = scoring_summary(lifecycle.ledger, statistics)
    assert fields["verifier"] == lengths.summary()
    truncation = fields["truncation"]
    assert isinstance(truncation, dict)
    assert truncation["kept"] == {"completions": 4, "truncated": 2, "truncated_passed": 1}
