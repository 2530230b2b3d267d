"""Validation of messages: every invalid field is rejected with its name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speed_async.buffer.ledger import MAX_KINDS
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation import MAX_KNOWN
from speed_async.buffer.validation_rules import MAX_TEXT, PayloadRules
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.codec import decode, encode
from speed_async.transport.joining import Join, Leaving
from speed_async.transport.muting import BlockedPeers
from speed_async.types import ActorCounts
from tests.fakes.buffer_fixtures import make_config, make_group
from tests.fakes.service_harness import (
    ServiceHarness,
    evaluated,
    failed,
    kinds,
    screened_out,
    trained,
)

NEWEST = 4


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


GROUP = make_group(0, 0)
COUNTS = ActorCounts()
REPORT = m.ActorReport(counts=COUNTS, gauges={"slots_busy": 1.0})
APPLIED = m.WeightsApplied(
    counts=COUNTS, policy_version=3, epoch=1, pause_s=0.0, transfer_s=0.1, error=""
)
HELLO = m.Hello(role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
PUBLISH = m.PublishWeights(
    policy_version=4, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[-1] = value
    return changed


def fault_of(rules: PayloadRules, message: m.Message) -> str | None:
    """The fault of a message, including that of a group's arrays."""
    fault = rules.fault(message, NEWEST)
    if fault is not None or not isinstance(message, m.GroupFinished):
        return fault
    try:
        rules.check_group(message, NEWEST)
    except ProtocolError as error:
        return str(error)
    return None


@pytest.fixture
def rules(tmp_path: Path) -> PayloadRules:
    (tmp_path / "config.json").write_text("{}")
    return PayloadRules(make_config(str(tmp_path)), vocab_size=100)


def test_valid_messages_are_accepted(rules: PayloadRules) -> None:
    refused = replace(APPLIED, policy_version=-1, error="out of memory", usable=False)
    valid: list[m.Message] = [GROUP, screened_out(1), failed(1, "drained"), evaluated(1), REPORT]
    valid += [APPLIED, refused, HELLO, PUBLISH, trained(9, [1, 2], groups=2, tokens=9)]
    valid += [m.WantWork(counts=COUNTS, num_prompts=0), m.Goodbye(counts=COUNTS)]
    valid += [m.TakeBatch(policy_version=3, num_groups=2), Leaving(counts=COUNTS)]
    failure = decode(encode(m.Failure(role="learner", message="x" * 9999)))
    valid += [Join(machine="node-7", process_id=3), failure]
    valid += [replace(REPORT, gauges={"loop_lag_s": -1e-6})]
    assert [fault_of(rules, message) for message in valid] == [None] * len(valid)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (replace(GROUP, token_ids=with_value(GROUP.token_ids, 100)), "token 100 is not in the voc"),
        (replace(GROUP, token_ids=with_value(GROUP.token_ids, -1)), "token ids >= 0"),
        (replace(GROUP, prompt_token_ids=int32(5, 2**31 - 1)), "token 2147483647 is not in"),
        (replace(GROUP, prompt_token_ids=int32()), "the prompt is empty"),
        (replace(GROUP, logprobs=with_value(GROUP.logprobs, np.nan)), "logprobs finite"),
        (replace(GROUP, logprobs=with_value(GROUP.logprobs, -np.inf)), "logprobs finite"),
        (replace(GROUP, policy_versions=with_value(GROUP.policy_versions, 5)), "is newer than"),
        (replace(GROUP, policy_versions=with_value(GROUP.policy_versions, -1)), "versions >= 0"),
        (make_group(0, 0, rewards=(1, 0, 0)), "3 completions; a group has 4"),
        (make_group(0, 0, tokens_each=65), "longer than actors.max_new_tokens = 64"),
        (replace(GROUP, num_screening=4), "num_screening must be 2"),
        (replace(GROUP, lease_id=-1), "lease_id = -1 is out of range"),
        (replace(GROUP, number=-1), "number = -1 is out of range"),
        (replace(GROUP, received=2**62), "received = 4611686018427387904 is out of range"),
        (screened_out(1, num_passed=3), "3 of 2 completions passed"),
        (screened_out(1, num_passed=-1), "num_passed = -1 is out of range"),
        (replace(screened_out(1, 1, 1), num_truncated_passed=2), "2 truncated completions passed"),
        (replace(evaluated(1), num_unscored=1), "1 passed and 1 unscored of 1 completions"),
        (replace(screened_out(1), num_completions=5), "more than a screening has"),
        (replace(screened_out(1), num_tokens=129), "num_tokens = 129 is more than 2 completions"),
        (replace(screened_out(1), num_tokens=-6), "num_tokens = -6 is out of range"),
        (replace(failed(1, "x"), num_tokens=1), "num_tokens = 1 is more than 0 completions"),
        (replace(failed(1, "x"), num_completions=5), "more than a lease has"),
        (failed(1, "x" * (MAX_TEXT + 1)), f"reason has {MAX_TEXT + 1} characters"),
        (replace(evaluated(1), newest_version=5), "from the future"),
        (replace(evaluated(1), oldest_version=1), "above newest_version"),
        (replace(REPORT, gauges={"a": float("inf")}), "finite"),
        (replace(REPORT, gauges={"a": float("nan")}), "finite"),
        (replace(REPORT, gauges={str(i): 0.0 for i in range(1025)}), "too many entries"),
        (replace(APPLIED, policy_version=5), "from the future"),
        (replace(APPLIED, policy_version=-2), "policy_version = -2 is out of range"),
        (replace(APPLIED, epoch=-1), "epoch = -1 is out of range"),
        (replace(APPLIED, pause_s=-0.5), "pause_s = -0.5 is out of range"),
        (m.WantWork(counts=COUNTS, num_prompts=-1), "num_prompts = -1 is out of range"),
        (m.Goodbye(counts=ActorCounts(tokens_generated=-1)), "counts.tokens_generated = -1"),
        (m.Goodbye(counts=ActorCounts(groups_leased=2**60)), "counts.groups_leased ="),
        (m.Goodbye(counts=ActorCounts(groups_in_flight=1)), "more groups in flight than"),
        (m.Goodbye(counts=ActorCounts(tokens_in_flight=1)), "more tokens in flight than"),
        (
            m.Goodbye(counts=ActorCounts(groups_leased=9, groups_continuing=1)),
            "more groups continuing than in flight",
        ),
        (replace(HELLO, role="king"), "role 'king' is not one of"),
        (replace(HELLO, index=2**40), "index = 1099511627776 is above"),
        (replace(HELLO, weight_ranks=0), "weight_ranks must be between 1"),
        (Join(machine="a\x1b[31m", process_id=1), "machine is not a printable name"),
        (m.TakeBatch(policy_version=0, num_groups=0), "num_groups must be between 1 and 8"),
        (m.TakeBatch(policy_version=0, num_groups=9), "num_groups must be between 1 and 8"),
        (trained(1, [3, 3], groups=2, tokens=1), "lease_ids has duplicates"),
        (trained(1, [-3], groups=1, tokens=1), "has an id that is out of range"),
        (replace(PUBLISH, store_port=65536), "is above 65535"),
        (replace(PUBLISH, deadline_s=-1.0), "deadline_s = -1.0 is out of range"),
    ],
)
def test_invalid_messages_are_rejected_with_the_reason(
    rules: PayloadRules, message: m.Message, expected: str
) -> None:
    fault = fault_of(rules, message)
    assert fault is not None
    assert fault.startswith(f"{type(message).__name__}: ")
    assert expected in fault


def test_refused_actor_is_rejected_once_and_blocked_and_its_prompts_are_requeued(
    tmp_path: Path,
) -> None:
    harness = ServiceHarness(tmp_path, buffer={"credits": 20})
    harness.pass_baseline()
    harness.hello("actor-2.0", 2)
    leases = harness.lease(3)
    validator, ledger = harness.service.validator, harness.service.lifecycle.ledger
    invalid = replace(make_group(leases.lease_ids[0], leases.prompt_ids[0]), num_screening=0)
    replies = harness.send("actor-1.0", invalid)
    assert [kind for kind in kinds(replies) if kind != "Leases"] == ["Rejected"]
    assert (validator.num_refused, validator.to_block) == (1, ["actor-1.0"])
    assert [state.name for state in harness.service.membership.present()] == ["actor-2.0"]
    assert harness.ends() == {"failed": (3, 0)}
    assert all(ledger.checks(harness.service.lifecycle.leases.num_training).values())
    requeued = harness.lease(3, "actor-2.0")
    assert requeued.prompt_ids == leases.prompt_ids
    fields = harness.events[-1].values if harness.events else {}
    harness.wait(0.1)
    fields = harness.events[-1].values
    assert fields["messages_refused"] == 1


@pytest.mark.parametrize(
    ("kind", "result", "expected"),
    [
        ("evaluation", lambda lease: make_group(lease, 0), "is for evaluation"),
        ("evaluation", screened_out, "is for evaluation"),
        ("training", evaluated, "is for training"),
        ("training", lambda lease: make_group(lease, 77), "is for prompt "),
    ],
)
def test_result_that_does_not_match_its_lease_is_rejected_and_the_ledger_balances(
    tmp_path: Path, kind: str, result: Callable[[int], m.Message], expected: str
) -> None:
    harness = ServiceHarness(tmp_path)
    if kind == "training":
        harness.pass_baseline()
        leases = harness.lease(1)
    else:
        harness.hello("learner", 0)
        harness.hello("actor-1.0", 1)
        leases = harness.lease(1)
    assert leases.kind == kind
    replies = harness.send("actor-1.0", result(leases.lease_ids[0]))
    [refused] = [message for _, message in replies if isinstance(message, m.Rejected)]
    assert expected in refused.reason
    lifecycle = harness.service.lifecycle
    assert all(lifecycle.ledger.checks(lifecycle.leases.num_training).values())
    assert not harness.service.membership.present()


def test_learner_trains_only_groups_of_its_batches(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    before = harness.ends()
    [(peer, reply)] = harness.send("learner", trained(1, [77], groups=1, tokens=1))
    assert peer == "learner"
    assert isinstance(reply, m.Rejected)
    assert "lease 77 is not in training" in reply.reason
    assert (harness.ends(), harness.service.policy_version) == (before, 0)


def test_second_learner_is_rejected(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    [(_, reply)] = harness.send("other", replace(HELLO, role="learner", index=0))
    assert isinstance(reply, m.Rejected)
    assert harness.service.membership.learner == "learner"
    assert kinds(harness.hello("learner", 0)) == ["Welcome"]  # the learner itself may reconnect


def test_flood_of_unknown_peers_leaves_no_state(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    before = harness.service.membership.num_known
    for number in range(300):
        name = f"unknown-{number}"
        want = m.WantWork(counts=COUNTS, num_prompts=1)
        assert kinds(harness.send(name, want)) == ["Rejected"]
        assert kinds(harness.send(name, replace(HELLO, fingerprint="other"))) == ["Rejected"]
    assert harness.service.membership.num_known == before
    assert harness.service.validator.num_refused == 600


def test_number_of_admitted_actors_is_bounded(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    lost = harness.service.membership.lost
    lost.update({f"old-{number}": "restarted" for number in range(MAX_KNOWN)})
    for message in (HELLO, Join(machine="m", process_id=1)):
        [(_, reply)] = harness.send("one-more", message)
        assert isinstance(reply, m.Rejected)
        assert f"has admitted {MAX_KNOWN} actors, the maximum" in reply.reason


def test_number_and_size_of_failure_kinds_are_bounded(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    ledger = harness.service.lifecycle.ledger
    for number in range(1000):
        ledger.failed(f"{number} {'x' * 1000}: no", 0)
    assert len(ledger.failures) == MAX_KINDS + 1
    assert sum(ledger.failures.values()) == 1000
    assert max(map(len, ledger.failures)) <= 100


def test_blocked_peers_table_is_bounded_and_its_counter_is_not() -> None:
    table = BlockedPeers(capacity=2)
    for name in (b"a", b"b", b"a", b"c"):
        table.add(name)
    assert [name in table for name in (b"a", b"b", b"c")] == [False, True, True]
    assert (len(table), table.num_blocked) == (2, 3)


def test_failure_of_an_unknown_peer_does_not_end_the_run(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    for peer, role in (("unknown", "learner"), ("unknown", "unknown"), ("actor-9.0", "actor-9")):
        assert kinds(harness.send(peer, m.Failure(role=role, message="stop"))) == ["Rejected"]
    assert not harness.service.ended
    # The failure of a rank before its first message is accepted.
    early = ServiceHarness(tmp_path)
    early.send("actor-1.0", m.Failure(role="actor-1", message="no such model"))
    assert early.service.ended


def test_rejected_unknown_peer_leaves_no_session_and_no_record(tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    machine = StateMachine(harness.service)
    want = m.WantWork(counts=COUNTS, num_prompts=1)
    for number in (0, 1, 7):  # unnumbered, first of a session, within a session
        machine.message(f"unknown-{number}", replace(want, number=number), 0.0)
        [(peer, reply)] = machine.sessions.replies
        assert (peer, type(reply)) == (f"unknown-{number}", m.Rejected)
        machine.sessions.replies.clear()
        assert not machine.sessions.has_unsent(peer)
        assert peer not in machine.sessions._sessions
    validator = harness.service.validator
    assert validator.to_block == ["unknown-0", "unknown-1", "unknown-7"]
    assert validator.num_refused == 3
