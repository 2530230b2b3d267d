"""What a message must say to be believed: every lie that an actor could tell is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from buffer_fixtures import make_config, make_group
from service_desk import Desk, evaluated, failed, kinds, screened_out, trained

from speed_async.buffer.ledger import MAX_KINDS
from speed_async.buffer.state_machine import StateMachine
from speed_async.buffer.validation import MAX_KNOWN
from speed_async.buffer.validation_rules import MAX_TEXT, PayloadRules
from speed_async.errors import ProtocolError
from speed_async.transport import messages as m
from speed_async.transport.joining import Join, Leaving
from speed_async.transport.muting import BlockedPeers
from speed_async.types import ActorCounts

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


def fault_of(inspection: PayloadRules, message: m.Message) -> str | None:
    """What the validator finds, and then, of a group, its weighing."""
    fault = inspection.fault(message, NEWEST)
    if fault is not None or not isinstance(message, m.GroupFinished):
        return fault
    try:
        inspection.weigh(message, NEWEST)
    except ProtocolError as error:
        return str(error)
    return None


@pytest.fixture
def inspection(tmp_path: Path) -> PayloadRules:
    (tmp_path / "config.json").write_text("{}")
    return PayloadRules(make_config(str(tmp_path)), vocab_size=100)


def test_what_honest_roles_say_is_believed(inspection: PayloadRules) -> None:
    refused = replace(APPLIED, policy_version=-1, error="out of memory", usable=False)
    honest: list[m.Message] = [GROUP, screened_out(1), failed(1, "drained"), evaluated(1), REPORT]
    honest += [APPLIED, refused, HELLO, PUBLISH, trained(9, [1, 2], groups=2, tokens=9)]
    honest += [m.WantWork(counts=COUNTS, num_prompts=0), m.Goodbye(counts=COUNTS)]
    honest += [m.TakeBatch(policy_version=3, num_groups=2), Leaving(counts=COUNTS)]
    honest += [Join(machine="node-7", process_id=3), m.Failure(role="learner", message="x" * 9999)]
    honest += [replace(REPORT, gauges={"loop_lag_s": -1e-6})]
    assert [fault_of(inspection, message) for message in honest] == [None] * len(honest)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (replace(GROUP, token_ids=with_value(GROUP.token_ids, 100)), "token 100 is not in the voc"),
        (replace(GROUP, token_ids=with_value(GROUP.token_ids, -1)), "token ids >= 0"),
        (replace(GROUP, prompt_token_ids=int32(5, 2**31 - 1)), "token 2147483647 is not in"),
        (replace(GROUP, prompt_token_ids=int32()), "it has no prompt"),
        (replace(GROUP, logprobs=with_value(GROUP.logprobs, np.nan)), "logprobs finite"),
        (replace(GROUP, logprobs=with_value(GROUP.logprobs, -np.inf)), "logprobs finite"),
        (replace(GROUP, policy_versions=with_value(GROUP.policy_versions, 5)), "is newer than"),
        (replace(GROUP, policy_versions=with_value(GROUP.policy_versions, -1)), "versions >= 0"),
        (make_group(0, 0, rewards=(1, 0, 0)), "3 completions; a group has 4"),
        (make_group(0, 0, tokens_each=65), "longer than actors.max_new_tokens = 64"),
        (replace(GROUP, num_screening=4), "num_screening must be 2"),
        (replace(GROUP, lease_id=-1), "lease_id = -1 cannot be"),
        (replace(GROUP, number=-1), "number = -1 cannot be"),
        (replace(GROUP, heard=2**62), "heard = 4611686018427387904 cannot be"),
        (screened_out(1, num_passed=3), "3 of 2 completions passed"),
        (screened_out(1, num_passed=-1), "num_passed = -1 cannot be"),
        (replace(screened_out(1), num_completions=5), "no screening's"),
        (replace(screened_out(1), num_tokens=129), "num_tokens = 129 is more than 2 completions"),
        (replace(screened_out(1), num_tokens=-6), "num_tokens = -6 cannot be"),
        (replace(failed(1, "x"), num_tokens=1), "num_tokens = 1 is more than 0 completions"),
        (replace(failed(1, "x"), num_completions=5), "more than a lease has"),
        (failed(1, "x" * (MAX_TEXT + 1)), f"reason has {MAX_TEXT + 1} characters"),
        (evaluated(1, num_completions=2), "must be evaluate.num_samples = 1"),
        (replace(evaluated(1), newest_version=5), "from the future"),
        (replace(evaluated(1), oldest_version=1), "above newest_version"),
        (replace(REPORT, gauges={"a": float("inf")}), "finite"),
        (replace(REPORT, gauges={"a": float("nan")}), "finite"),
        (replace(REPORT, gauges={str(i): 0.0 for i in range(1025)}), "too many"),
        (replace(APPLIED, policy_version=5), "from the future"),
        (replace(APPLIED, policy_version=-2), "policy_version = -2 cannot be"),
        (replace(APPLIED, epoch=-1), "epoch = -1 cannot be"),
        (replace(APPLIED, pause_s=-0.5), "pause_s = -0.5 cannot be"),
        (m.WantWork(counts=COUNTS, num_prompts=-1), "num_prompts = -1 cannot be"),
        (m.Goodbye(counts=ActorCounts(tokens_generated=-1)), "counts.tokens_generated = -1"),
        (m.Goodbye(counts=ActorCounts(groups_leased=2**60)), "counts.groups_leased ="),
        (m.Goodbye(counts=ActorCounts(groups_in_flight=1)), "more groups in flight than"),
        (m.Goodbye(counts=ActorCounts(tokens_in_flight=1)), "more tokens in flight than"),
        (
            m.Goodbye(counts=ActorCounts(groups_leased=9, groups_continuing=1)),
            "more groups continuing than in flight",
        ),
        (replace(HELLO, role="king"), "role 'king' is none of"),
        (replace(HELLO, index=2**40), "is no rank"),
        (replace(HELLO, weight_ranks=0), "weight_ranks must be between 1"),
        (Join(machine="a\x1b[31m", process_id=1), "machine is no name"),
        (m.TakeBatch(policy_version=0, num_groups=0), "num_groups must be between 1 and 8"),
        (m.TakeBatch(policy_version=0, num_groups=9), "num_groups must be between 1 and 8"),
        (trained(1, [3, 3], groups=2, tokens=1), "trained twice"),
        (trained(1, [-3], groups=1, tokens=1), "holds what is no id"),
        (replace(PUBLISH, store_port=65536), "is no port"),
        (replace(PUBLISH, deadline_s=-1.0), "deadline_s = -1.0 cannot be"),
    ],
)
def test_what_cannot_be_is_named(inspection: PayloadRules, message: m.Message, said: str) -> None:
    fault = fault_of(inspection, message)
    assert fault is not None
    assert fault.startswith(f"{type(message).__name__}: ")
    assert said in fault


def test_a_refused_actor_is_told_once_muted_and_its_prompts_return(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    desk.hello("actor-2.0", 2)
    leases = desk.lease(3)
    guard, ledger = desk.service.validator, desk.service.lifecycle.ledger
    lie = replace(make_group(leases.lease_ids[0], leases.prompt_ids[0]), num_screening=0)
    answers = desk.say("actor-1.0", lie)
    assert [kind for kind in kinds(answers) if kind != "Leases"] == ["Rejected"]
    assert (guard.num_refused, guard.to_mute) == (1, ["actor-1.0"])
    assert [state.name for state in desk.service.membership.present()] == ["actor-2.0"]
    assert desk.ends() == {"failed": (3, 0)}
    assert all(ledger.checks(desk.service.lifecycle.leases.num_training).values())
    again = desk.lease(3, "actor-2.0")
    assert again.prompt_ids == leases.prompt_ids
    fields = desk.service.events[-1].values if desk.service.events else {}
    desk.wait(0.1)
    fields = desk.service.events[-1].values
    assert fields["messages_refused"] == 1


@pytest.mark.parametrize(
    ("kind", "result", "said"),
    [
        ("evaluation", lambda lease: make_group(lease, 0), "is for evaluation"),
        ("evaluation", screened_out, "is for evaluation"),
        ("training", evaluated, "is for training"),
        ("training", lambda lease: make_group(lease, 77), "is for prompt "),
    ],
)
def test_a_result_that_is_not_of_its_lease_is_refused_and_the_books_close(
    tmp_path: Path, kind: str, result: Callable[[int], m.Message], said: str
) -> None:
    desk = Desk(tmp_path)
    if kind == "training":
        desk.past_baseline()
        leases = desk.lease(1)
    else:
        desk.hello("learner", 0)
        desk.hello("actor-1.0", 1)
        leases = desk.lease(1)
    assert leases.kind == kind
    answers = desk.say("actor-1.0", result(leases.lease_ids[0]))
    [refused] = [message for _, message in answers if isinstance(message, m.Rejected)]
    assert said in refused.reason
    lifecycle = desk.service.lifecycle
    assert all(lifecycle.ledger.checks(lifecycle.leases.num_training).values())
    assert not desk.service.membership.present()


def test_the_learner_trains_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    before = desk.ends()
    [(peer, answer)] = desk.say("learner", trained(1, [77], groups=1, tokens=1))
    assert peer == "learner"
    assert isinstance(answer, m.Rejected)
    assert "lease 77 is not in training" in answer.reason
    assert (desk.ends(), desk.service.policy_version) == (before, 0)


def test_nobody_takes_the_learner_s_place(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    [(_, answer)] = desk.say("thief", replace(HELLO, role="learner", index=0))
    assert isinstance(answer, m.Rejected)
    assert desk.service.membership.learner == "learner"
    assert kinds(desk.hello("learner", 0)) == ["Welcome"]  # the learner itself may come back


def test_a_flood_of_strangers_leaves_nothing_behind(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    before = desk.service.membership.num_known
    for number in range(300):
        name = f"stranger-{number}"
        want = m.WantWork(counts=COUNTS, num_prompts=1)
        assert kinds(desk.say(name, want)) == ["Rejected"]
        assert kinds(desk.say(name, replace(HELLO, fingerprint="other"))) == ["Rejected"]
    assert desk.service.membership.num_known == before
    assert desk.service.validator.num_refused == 600


def test_a_run_takes_in_a_bounded_number_of_actors(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    lost = desk.service.membership.lost
    lost.update({f"old-{number}": "restarted" for number in range(MAX_KNOWN)})
    for message in (HELLO, Join(machine="m", process_id=1)):
        [(_, answer)] = desk.say("one-more", message)
        assert isinstance(answer, m.Rejected)
        assert "takes no more" in answer.reason


def test_an_actor_s_wording_of_failures_does_not_pile_up(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    ledger = desk.service.lifecycle.ledger
    for number in range(1000):
        ledger.failed(f"{number} {'x' * 1000}: no", 0)
    assert len(ledger.failures) == MAX_KINDS + 1
    assert sum(ledger.failures.values()) == 1000
    assert max(map(len, ledger.failures)) <= 100


def test_the_mute_table_is_bounded_and_counts_on() -> None:
    table = BlockedPeers(capacity=2)
    for name in (b"a", b"b", b"a", b"c"):
        table.add(name)
    assert [name in table for name in (b"a", b"b", b"c")] == [False, True, True]
    assert (len(table), table.num_muted) == (2, 3)


def test_a_stranger_s_failure_does_not_end_the_run(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    for peer, role in (("stranger", "learner"), ("stranger", "stranger"), ("actor-9.0", "actor-9")):
        assert kinds(desk.say(peer, m.Failure(role=role, message="stop"))) == ["Rejected"]
    assert not desk.service.ended
    # A rank that fails before its first word is believed.
    early = Desk(tmp_path)
    early.say("actor-1.0", m.Failure(role="actor-1", message="no such model"))
    assert early.service.ended


def test_a_stranger_that_is_turned_away_leaves_no_session_and_no_record(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.past_baseline()
    machine = StateMachine(desk.service)
    want = m.WantWork(counts=COUNTS, num_prompts=1)
    for number in (0, 1, 7):  # outside a session, the first of one, in the midst of one
        machine.message(f"stranger-{number}", replace(want, number=number), 0.0)
        [(peer, answer)] = machine.conversations.replies
        assert (peer, type(answer)) == (f"stranger-{number}", m.Rejected)
        machine.conversations.replies.clear()
        assert not machine.conversations.has_unsent(peer)
        assert peer not in machine.conversations._sessions
    guard = desk.service.validator
    assert guard.to_mute == ["stranger-0", "stranger-1", "stranger-7"]
    assert guard.num_refused == 3
