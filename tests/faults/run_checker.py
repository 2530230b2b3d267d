"""Checks the invariants of a run from independent counts.

Reads the traces that actors and learner wrote of every group (traces.py), and compares them with
the service's ledger, summary.json and metrics.jsonl.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.lost_records import LostRecords
from tests.faults.traces import Traces, Update, read_traces


@dataclass(kw_only=True)
class Verdict:
    """Result of a check. `findings` is empty if all invariants require."""

    findings: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def require(self, holds: bool, finding: str) -> None:
        if not holds:
            self.findings.append(finding)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts from the actors' traces: results that the service accepted, certainly or possibly."""

    certain: Counter[str]
    possible: Counter[str]
    groups: dict[str, int]
    """Tokens of every group ever sent, by digest."""
    accepted: set[str]
    generated_least: int
    generated_most: int


def count(traces: Traces) -> Counts:
    certain: Counter[str] = Counter()
    possible: Counter[str] = Counter()
    groups: dict[str, int] = {}
    accepted: set[str] = set()
    least = most = 0
    for actor in traces.actors:
        for line in actor.sent:
            is_accepted = actor.is_accepted(line)
            (certain if is_accepted else possible)[line["end"]] += 1
            if line["end"] == "group":
                groups[line["group"]] = line["tokens"]
                if is_accepted:
                    accepted.add(line["group"])
        reported = [generated for number, generated in actor.counted if number <= actor.accepted]
        least += max(reported, default=0)
        most += max((generated for _, generated in actor.counted), default=0)
    return Counts(
        certain=certain,
        possible=possible,
        groups=groups,
        accepted=accepted,
        generated_least=least,
        generated_most=most,
    )


def check_running(traces: Traces, lost: LostRecords | None = None) -> list[str]:
    """Check what holds at any time: no group occurs twice in the lineage, no update contains an
    unknown group, and no repeated update has other groups than before."""
    verdict = Verdict()
    _check_lineage(verdict, traces)
    _check_replays(verdict, traces, lost or LostRecords())
    return verdict.findings


def check_finished(
    trace_folder: Path,
    run_folder: Path,
    num_updates: int,
    held: set[str],
    lost: LostRecords | None = None,
) -> Verdict:
    """Check a finished run. `held`: groups that its journal still holds. `lost`: records that
    faults cut from it."""
    verdict, traces = Verdict(), read_traces(trace_folder)
    lost = lost or LostRecords()
    _check_lineage(verdict, traces)
    _check_replays(verdict, traces, lost)
    summary = json.loads((run_folder / "summary.json").read_text())
    lineage, counts = traces.lineage(), count(traces)
    versions = sorted(lineage)
    verdict.require(
        versions == [*range(1, num_updates + 1)],
        f"the lineage has {len(versions)} versions up to {max(versions, default=0)}, "
        f"not each of 1 to {num_updates}",
    )
    verdict.require(
        summary["policy_version"] == num_updates,
        f"the run ended at version {summary['policy_version']}, not {num_updates}",
    )
    _check_ledger(verdict, summary["ledger"], traces, counts, lost)
    trained = {group for update in lineage.values() for group in update.groups}
    _check_held(verdict, summary["ledger"]["groups"], trained, held, counts.accepted - lost.groups)
    _check_metrics(verdict, run_folder, num_updates)
    return verdict


def _check_lineage(verdict: Verdict, traces: Traces) -> None:
    known = count(traces).groups
    trained_at: dict[str, int] = {}
    for version, update in sorted(traces.lineage().items()):
        for group in update.groups:
            verdict.require(
                group in known, f"version {version} trained {group}, which was never sent"
            )
            first = trained_at.setdefault(group, version)
            verdict.require(
                first == version, f"group {group} was trained twice: versions {first}, {version}"
            )
        verdict.require(
            len(set(update.groups)) == len(update.groups),
            f"version {version} contains a group twice",
        )


def _check_replays(verdict: Verdict, traces: Traces, lost: LostRecords) -> None:
    """An update known to the service is repeated with the same groups in the same order, unless
    its record was cut from the journal in between."""
    known: dict[int, Update] = {}
    for update in traces.updates:
        before = known.get(update.policy_version)
        if before is not None and not any(
            before.time_s <= cut_s <= update.time_s for cut_s in lost.times_s
        ):
            verdict.require(
                before.groups == update.groups,
                f"version {update.policy_version} was trained again with other groups",
            )
        if update.is_acknowledged:
            known[update.policy_version] = update


def _check_held(
    verdict: Verdict, groups: dict[str, int], trained: set[str], held: set[str], accepted: set[str]
) -> None:
    """Each acknowledged group was trained, or is still held in the journal."""
    # Without acknowledged groups, the check below would pass trivially.
    verdict.require(bool(accepted), "the traces contain no acknowledged group")
    missing = accepted - trained - held
    verdict.require(
        not missing,
        f"{len(missing)} accepted groups are lost (neither trained nor held), for example "
        f"{sorted(missing)[:3]}",
    )
    twice = trained & held
    verdict.require(not twice, f"{len(twice)} groups were trained and still held")
    dropped = groups["stale"] + groups["evicted"]
    verdict.require(dropped == 0, f"{dropped} groups ended as stale or evicted; no drill does that")
    counted = groups["buffered"] + groups["in_training"]
    verdict.require(
        counted == len(held), f"the ledger holds {counted} groups, the journal {len(held)}"
    )


def _check_ledger(
    verdict: Verdict, ledger: dict[str, Any], traces: Traces, counts: Counts, lost: LostRecords
) -> None:
    groups, tokens = ledger["groups"], ledger["tokens"]
    verdict.require(ledger["closes"] is True, f"the ledger does not balance: {ledger['checks']}")
    updates = [update for update in traces.lineage().values() if not update.skipped]
    num_trained = sum(len(update.groups) for update in updates)
    verdict.require(
        groups["trained"] == num_trained,
        f"the ledger has {groups['trained']} groups as trained, the learner's trace {num_trained}",
    )
    tokens_trained = sum(update.tokens for update in updates)
    verdict.require(
        tokens["trained"] == tokens_trained,
        f"the ledger has {tokens['trained']} tokens as trained, the trace {tokens_trained}",
    )
    for end in ("screened_out", "evaluation"):
        name = "evaluated" if end == "evaluation" else end
        least, most = counts.certain[name], counts.certain[name] + counts.possible[name]
        if end == "evaluation":  # a lost or failed evaluation lease is also counted here
            most += counts.certain["failed"] + counts.possible["failed"]
        verdict.require(
            least - lost.results[name] <= groups[end] <= most,
            f"the ledger has {groups[end]} as {end}, the actors sent {least} to {most}",
        )
    least, most = counts.generated_least, counts.generated_most
    least = 0 if lost.times_s else least  # the latest counts were in the cut tail
    verdict.require(
        least <= tokens["generated"] <= most,
        f"the ledger has {tokens['generated']} tokens as generated, the actors {least} to {most}",
    )
    ends = (
        "trained",
        "stale",
        "evicted",
        "screened_out",
        "failed",
        "unfinished",
        "buffered",
        "in_training",
    )
    total = sum(groups[end] for end in (*ends, "in_flight"))
    verdict.require(
        groups["generated"] == total,
        f"{groups['generated']} groups were leased and {total} ended or are held",
    )
    verdict.numbers |= {
        "updates": len(traces.lineage()),
        "updates_rolled_back": len(traces.updates) - len(traces.lineage()),
        "groups_trained": num_trained,
        "groups_accepted": len(counts.accepted),
        "groups_kept": groups["buffered"] + groups["in_training"],
        "results": sum(counts.certain.values()) + sum(counts.possible.values()),
        "actor_incarnations": len(traces.actors),
    }


def _check_metrics(verdict: Verdict, run_folder: Path, num_updates: int) -> None:
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    last = events[-1] if events else {}
    verdict.require(
        last.get("kind") == "end" and last.get("ok") is True,
        f"metrics.jsonl ends with {last.get('kind')} ({last.get('reason')})",
    )
    reported = {event["policy_version"] for event in events if event["kind"] == "step"}
    verdict.require(num_updates in reported, f"metrics.jsonl has no step of version {num_updates}")
