"""Decides whether a run kept its promises, from counts of its own.

It reads what actors and learner wrote of every group that passed (traces.py), and holds the
service's own books, summary.json and metrics.jsonl, against that.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.lost_records import LostRecords
from chaos.traces import Traces, Update, read_traces


@dataclass(kw_only=True)
class Verdict:
    """`findings` is empty for a run that kept its promises."""

    findings: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def hold(self, holds: bool, finding: str) -> None:
        if not holds:
            self.findings.append(finding)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the actors' traces say: each result either surely taken by the service, or perhaps."""

    surely: Counter[str]
    perhaps: Counter[str]
    groups: dict[str, int]
    """Tokens of every group ever sent, by digest."""
    accepted: set[str]
    generated_least: int
    generated_most: int


def count(traces: Traces) -> Counts:
    surely: Counter[str] = Counter()
    perhaps: Counter[str] = Counter()
    groups: dict[str, int] = {}
    accepted: set[str] = set()
    least = most = 0
    for actor in traces.actors:
        for line in actor.sent:
            is_accepted = actor.is_accepted(line)
            (surely if is_accepted else perhaps)[line["end"]] += 1
            if line["end"] == "group":
                groups[line["group"]] = line["tokens"]
                if is_accepted:
                    accepted.add(line["group"])
        told = [generated for number, generated in actor.counted if number <= actor.accepted]
        least += max(told, default=0)
        most += max((generated for _, generated in actor.counted), default=0)
    return Counts(
        surely=surely,
        perhaps=perhaps,
        groups=groups,
        accepted=accepted,
        generated_least=least,
        generated_most=most,
    )


def judge_so_far(traces: Traces, lost: LostRecords | None = None) -> list[str]:
    """What must hold at any instant: no group twice in the lineage, no update from nowhere, none
    that was trained again otherwise than before."""
    verdict = Verdict()
    _judge_lineage(verdict, traces)
    _judge_replays(verdict, traces, lost or LostRecords())
    return verdict.findings


def judge_ended(
    trace_folder: Path,
    run_folder: Path,
    num_updates: int,
    held: set[str],
    lost: LostRecords | None = None,
) -> Verdict:
    """Of a run that ended by itself. `held`: groups that its journal still holds; `lost`: what
    faults cut from it."""
    verdict, traces = Verdict(), read_traces(trace_folder)
    lost = lost or LostRecords()
    _judge_lineage(verdict, traces)
    _judge_replays(verdict, traces, lost)
    summary = json.loads((run_folder / "summary.json").read_text())
    lineage, counts = traces.lineage(), count(traces)
    versions = sorted(lineage)
    verdict.hold(
        versions == [*range(1, num_updates + 1)],
        f"the lineage has {len(versions)} versions up to {max(versions, default=0)}, "
        f"not each of 1 to {num_updates}",
    )
    verdict.hold(
        summary["policy_version"] == num_updates,
        f"it ended at version {summary['policy_version']}, not at {num_updates}",
    )
    _judge_ledger(verdict, summary["ledger"], traces, counts, lost)
    trained = {group for update in lineage.values() for group in update.groups}
    _judge_held(verdict, summary["ledger"]["groups"], trained, held, counts.accepted - lost.groups)
    _judge_metrics(verdict, run_folder, num_updates)
    return verdict


def _judge_lineage(verdict: Verdict, traces: Traces) -> None:
    known = count(traces).groups
    trained_at: dict[str, int] = {}
    for version, update in sorted(traces.lineage().items()):
        for group in update.groups:
            verdict.hold(group in known, f"version {version} trained {group}, which nobody sent")
            first = trained_at.setdefault(group, version)
            verdict.hold(
                first == version, f"group {group} was trained twice: versions {first}, {version}"
            )
        verdict.hold(
            len(set(update.groups)) == len(update.groups),
            f"version {version} holds a group twice",
        )


def _judge_replays(verdict: Verdict, traces: Traces, lost: LostRecords) -> None:
    """An update of which the service knew is trained again with the same groups in their order,
    unless its record went with a cut tail between the two."""
    known: dict[int, Update] = {}
    for update in traces.updates:
        before = known.get(update.policy_version)
        if before is not None and not any(
            before.time_s <= cut_s <= update.time_s for cut_s in lost.times_s
        ):
            verdict.hold(
                before.groups == update.groups,
                f"version {update.policy_version} was trained again with other groups",
            )
        if update.is_heard:
            known[update.policy_version] = update


def _judge_held(
    verdict: Verdict, groups: dict[str, int], trained: set[str], held: set[str], accepted: set[str]
) -> None:
    """Each group that the service confirmed was trained, or lies in the journal to be trained."""
    # Nothing can be missed of what nobody confirmed: without this, lost words are a clean verdict.
    verdict.hold(bool(accepted), "the traces say of no group that it was confirmed")
    missing = accepted - trained - held
    verdict.hold(
        not missing,
        f"{len(missing)} accepted groups were neither trained nor are they held: they are lost, "
        f"such as {sorted(missing)[:3]}",
    )
    twice = trained & held
    verdict.hold(not twice, f"{len(twice)} groups were trained and are held still")
    dropped = groups["stale"] + groups["evicted"]
    verdict.hold(dropped == 0, f"{dropped} groups ended as stale or evicted: no drill does that")
    counted = groups["buffered"] + groups["in_training"]
    verdict.hold(
        counted == len(held), f"the ledger holds {counted} groups, the journal {len(held)}"
    )


def _judge_ledger(
    verdict: Verdict, ledger: dict[str, Any], traces: Traces, counts: Counts, lost: LostRecords
) -> None:
    groups, tokens = ledger["groups"], ledger["tokens"]
    verdict.hold(ledger["closes"] is True, f"the ledger does not close: {ledger['checks']}")
    updates = [update for update in traces.lineage().values() if not update.skipped]
    num_trained = sum(len(update.groups) for update in updates)
    verdict.hold(
        groups["trained"] == num_trained,
        f"the ledger has {groups['trained']} groups as trained, the learner's trace {num_trained}",
    )
    tokens_trained = sum(update.tokens for update in updates)
    verdict.hold(
        tokens["trained"] == tokens_trained,
        f"the ledger has {tokens['trained']} tokens as trained, the trace {tokens_trained}",
    )
    for end in ("screened_out", "evaluation"):
        name = "evaluated" if end == "evaluation" else end
        least, most = counts.surely[name], counts.surely[name] + counts.perhaps[name]
        if end == "evaluation":  # a lost or failed lease of an evaluation counts there as well
            most += counts.surely["failed"] + counts.perhaps["failed"]
        verdict.hold(
            least - lost.results[name] <= groups[end] <= most,
            f"the ledger has {groups[end]} as {end}, the actors sent {least} to {most}",
        )
    least, most = counts.generated_least, counts.generated_most
    least = 0 if lost.times_s else least  # the counts that came last went with the tail
    verdict.hold(
        least <= tokens["generated"] <= most,
        f"the ledger has {tokens['generated']} tokens as generated, the actors {least} to {most}",
    )
    ends = ("trained", "stale", "evicted", "screened_out", "failed", "buffered", "in_training")
    total = sum(groups[end] for end in (*ends, "in_flight"))
    verdict.hold(
        groups["generated"] == total,
        f"{groups['generated']} groups were granted and {total} ended or are held",
    )
    verdict.numbers |= {
        "updates": len(traces.lineage()),
        "updates_taken_back": len(traces.updates) - len(traces.lineage()),
        "groups_trained": num_trained,
        "groups_accepted": len(counts.accepted),
        "groups_kept": groups["buffered"] + groups["in_training"],
        "results": sum(counts.surely.values()) + sum(counts.perhaps.values()),
        "actor_lives": len(traces.actors),
    }


def _judge_metrics(verdict: Verdict, run_folder: Path, num_updates: int) -> None:
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    last = events[-1] if events else {}
    verdict.hold(
        last.get("kind") == "end" and last.get("ok") is True,
        f"metrics.jsonl ends with {last.get('kind')} ({last.get('reason')})",
    )
    told = {event["policy_version"] for event in events if event["kind"] == "step"}
    verdict.hold(num_updates in told, f"metrics.jsonl has no step of version {num_updates}")
