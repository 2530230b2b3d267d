"""The run checker detects violated invariants in recorded traces."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speed_async.buffer.durability.journal import Journal
from speed_async.testing.inprocess_transport import InProcessHub
from speed_async.transport import messages as m
from speed_async.transport.codec import encode
from speed_async.transport.tracing import group_digest, with_tracing
from speed_async.types import ActorCounts
from tests.faults.lost_records import LostRecords
from tests.faults.run_checker import check_finished, check_running
from tests.faults.traces import read_traces


def sent(number: int, group: str = "", tokens: int = 10) -> dict[str, Any]:
    fields = {"end": "group", "group": group} if group else {"end": "screened_out"}
    return {"kind": "sent", "number": number, "tokens": tokens, "generated": 10 * number, **fields}


def trained(version: int, *groups: str) -> dict[str, Any]:
    return {
        "kind": "trained",
        "number": version,
        "policy_version": version,
        "groups": list(groups),
        "tokens": 10 * len(groups),
        "skipped": False,
    }


ALL_ACKNOWLEDGED = {"kind": "acked", "number": 99}
GOOD_ACTOR = [sent(1, "a"), sent(2, "b"), sent(3), sent(4, "c"), ALL_ACKNOWLEDGED]
GOOD_LEARNER = [trained(1, "a"), trained(2, "b")]


def write_run(folder: Path, actor: list[dict], learner: list[dict], **groups: int) -> None:
    """Write traces and the files of a run of two updates whose ledger contains `groups`."""
    (folder / "trace").mkdir(parents=True)
    for name, lines in (("actor-1.0", actor), ("learner", learner)):
        texts = [json.dumps({"time_s": float(at), **line}) for at, line in enumerate(lines)]
        (folder / "trace" / f"{name}-1.jsonl").write_text("".join(f"{text}\n" for text in texts))
    ends = [
        "trained",
        "stale",
        "evicted",
        "screened_out",
        "failed",
        "unfinished",
        "buffered",
        "in_training",
    ]
    counts = dict.fromkeys([*ends, "in_flight", "evaluation"], 0)
    counts |= {"generated": 4, "trained": 2, "screened_out": 1, "buffered": 1} | groups
    ledger = {"closes": True, "checks": {}, "groups": counts}
    ledger["tokens"] = {"trained": 20, "generated": 40}
    (folder / "summary.json").write_text(json.dumps({"policy_version": 2, "ledger": ledger}))
    events = [{"kind": "step", "policy_version": 2}, {"kind": "end", "ok": True}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def findings(folder: Path, **wrong: Any) -> str:
    actor, learner = wrong.pop("actor", GOOD_ACTOR), wrong.pop("learner", GOOD_LEARNER)
    held = wrong.pop("held", {"c"})
    write_run(folder, actor, learner, **wrong)
    return "; ".join(list_findings(folder, held))


def list_findings(folder: Path, held: set[str] | None = None) -> list[str]:
    held = {"c"} if held is None else held
    return check_finished(folder / "trace", folder, 2, held).findings


def test_a_correct_run_has_no_findings(tmp_path: Path) -> None:
    assert findings(tmp_path) == ""


def test_a_group_trained_twice_is_found(tmp_path: Path) -> None:
    assert "trained twice: versions 1, 2" in findings(
        tmp_path, learner=[trained(1, "a"), trained(2, "a")]
    )


def test_an_update_that_was_rolled_back_does_not_count(tmp_path: Path) -> None:
    rolled_back = [trained(1, "a"), trained(2, "c"), trained(2, "b")]
    assert findings(tmp_path, learner=rolled_back) == ""
    taken_back_and_lost = [trained(1, "c"), trained(2, "b"), trained(1, "a")]
    assert "not each of 1 to 2" in findings(tmp_path / "lost", learner=taken_back_and_lost)


def test_an_accepted_group_that_is_lost_is_found(tmp_path: Path) -> None:
    expected = "1 accepted groups are lost (neither trained nor held), for example ['c']"
    assert expected in findings(tmp_path / "0", held=set(), buffered=0, generated=3)
    # Another held group does not replace it.
    assert expected in findings(tmp_path / "1", held={"d"})
    assert "trained and still held" in findings(tmp_path / "2", held={"b", "c"}, buffered=2)
    assert "holds 1 groups, the journal 0" in findings(tmp_path / "3", held=set())
    assert "1 groups ended as stale" in findings(tmp_path / "4", stale=1, generated=5)


def test_a_repeated_update_with_other_groups_is_found(tmp_path: Path) -> None:
    repeated = [trained(1, "a"), {"kind": "acked", "number": 1}, trained(1, "c"), trained(2, "b")]
    expected = "version 1 was trained again with other groups"
    assert expected in findings(tmp_path / "known", learner=repeated)
    unknown = [repeated[0], *repeated[2:]]
    assert findings(tmp_path / "unknown", learner=unknown, held={"a"}) == ""


def test_a_group_that_the_service_never_acknowledged_may_be_missing(tmp_path: Path) -> None:
    unacknowledged = [*GOOD_ACTOR[:3], {"kind": "acked", "number": 3}, GOOD_ACTOR[3]]
    assert findings(tmp_path, actor=unacknowledged, held=set(), buffered=0, generated=3) == ""


def test_a_trace_without_acknowledgements_is_a_finding(tmp_path: Path) -> None:
    assert "contain no acknowledged group" in findings(tmp_path, actor=GOOD_ACTOR[:-1])


def test_unknown_groups_and_wrong_ledger_counts_are_found(tmp_path: Path) -> None:
    learner = [trained(1, "a"), trained(2, "z")]
    assert "trained z, which was never sent" in findings(tmp_path / "0", learner=learner)
    assert "as screened_out" in findings(tmp_path / "1", screened_out=2, generated=5)
    assert "3 groups as trained" in findings(tmp_path / "2", trained=3, generated=5)
    assert "9 groups were leased" in findings(tmp_path / "3", generated=9)


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        (("ledger", "closes"), False, "the ledger does not balance"),
        (("ledger", "tokens", "trained"), 21, "21 tokens as trained, the trace 20"),
        (("ledger", "tokens", "generated"), 41, "41 tokens as generated, the actors 40 to 40"),
        (("ledger", "tokens", "generated"), 39, "39 tokens as generated, the actors 40 to 40"),
        (("ledger", "groups", "evaluation"), 1, "1 as evaluation, the actors sent 0 to 0"),
        (("policy_version",), 1, "the run ended at version 1, not 2"),
    ],
)
def test_every_count_of_the_summary_is_checked(
    tmp_path: Path, where: tuple[str, ...], value: object, expected: str
) -> None:
    write_run(tmp_path, GOOD_ACTOR, GOOD_LEARNER)
    path = tmp_path / "summary.json"
    summary = json.loads(path.read_text())
    *sections, name = where
    counts = summary
    for section in sections:
        counts = counts[section]
    counts[name] = value
    path.write_text(json.dumps(summary))
    assert expected in "; ".join(list_findings(tmp_path))


def test_the_metrics_log_must_end_successfully_and_contain_the_last_step(tmp_path: Path) -> None:
    write_run(tmp_path, GOOD_ACTOR, GOOD_LEARNER)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text(lines[0] + "\n")
    assert "metrics.jsonl ends with step" in "; ".join(list_findings(tmp_path))
    log.write_text(lines[1] + "\n")
    assert list_findings(tmp_path) == ["metrics.jsonl has no step of version 2"]


def test_a_group_that_occurs_twice_in_one_update_is_found(tmp_path: Path) -> None:
    text = findings(tmp_path, learner=[trained(1, "a", "a"), trained(2, "b")], trained=3)
    assert "version 1 contains a group twice" in text


def test_checking_a_running_run_needs_no_summary(tmp_path: Path) -> None:
    write_run(tmp_path, GOOD_ACTOR, [trained(1, "a"), trained(2, "a")])
    assert len(check_running(read_traces(tmp_path / "trace"))) == 1


# --- the traces --------------------------------------------------------------------------------


def finished_group(number: int) -> m.GroupFinished:
    return m.GroupFinished(
        number=number,
        counts=ActorCounts(tokens_generated=5),
        lease_id=3,
        prompt_id=1,
        num_screening=1,
        prompt_token_ids=np.array([7], np.int32),
        lengths=np.array([2, 1], np.int32),
        rewards=np.array([0, 1], np.float32),
        passed=np.array([0, 1], np.int32),
        cut=np.zeros(2, np.int32),
        token_ids=np.array([4, 5, 6], np.int32),
        logprobs=np.zeros(3, np.float32),
        policy_versions=np.zeros(3, np.int32),
    )


def test_actor_and_learner_compute_the_same_digest_and_a_resent_message_counts_once(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        hub = InProcessHub()
        actor = with_tracing(hub.connect("actor-1.0"), str(tmp_path), "actor-1.0")
        learner = with_tracing(hub.connect("learner"), str(tmp_path), "learner")
        message = finished_group(1)
        for _ in range(2):
            await actor.send(message)
        hub.offer("actor-1.0", m.Welcome(policy_version=0, received=1))
        await actor.receive(1.0)
        hub.offer("learner", replace(message, number=1, received=0))
        hub.offer("learner", m.BatchReady(policy_version=0, lease_ids=[3]))
        for _ in range(2):
            await learner.receive(1.0)
        await learner.send(
            m.Trained(
                policy_version=1,
                lease_ids=[3],
                skipped=False,
                groups_trained=1,
                completions_trained=2,
                tokens_trained=3,
                metrics={},
            )
        )
        for link in (actor, learner):
            await link.close()

    asyncio.run(run())
    traces = read_traces(tmp_path)
    [actor], [update], [batch] = traces.actors, traces.updates, traces.batches
    assert [line["group"] for line in actor.sent] == [group_digest(finished_group(1))]
    assert actor.is_accepted(actor.sent[0])
    assert update.groups == batch["groups"] == [actor.sent[0]["group"]]
    assert update.tokens == 3


def test_records_in_the_cut_part_of_a_journal_are_recorded(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, 1, 0)
    for number in (1, 2):
        message = finished_group(number)
        journal.append("message", 0.0, peer="actor-1.0", frames=encode(message))
    journal.write()
    journal.close()
    segment = tmp_path / "00000001.journal"
    size, lost = segment.stat().st_size, LostRecords()
    lost.add(segment, size)
    assert (lost.groups, len(lost.times_s)) == (set(), 1)
    lost.add(segment, size - 1)
    assert lost.results == {"group": 1}
    lost.add(segment, size // 2 - 1)
    assert lost.results == {"group": 3}
    assert lost.groups == {group_digest(finished_group(1))}
