"""The final summary of a run, for a terminal."""

import shlex
import textwrap
from collections.abc import Mapping

from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.observability.notation import (
    DASH,
    count,
    counted,
    decimal,
    duration,
    finite,
    percent,
)

ENDS = (
    "trained",
    "screened_out",
    "stale",
    "evicted",
    "failed",
    "unfinished",
    "evaluation",
    "buffered",
    "in_training",
    "in_flight",
)
"""Order of the ledger rows; other rows follow."""
TOTAL = "generated"
"""The ledger row with the sum of the others, except evaluation, which has no training groups."""
MAX_EXAMPLE_CHARS = 240
STOPPING = (
    "stopping: the current update finishes, then a checkpoint and the summary are written (a "
    "second Ctrl-C ends the run immediately, without them)"
)
"""Message after the first stop signal."""


def summary_text(summary: Mapping[str, object], *, breakdown: bool = False) -> str:
    """Format the final summary as plain text of at most 80 columns (except paths).

    Keys are those reported by the service and the learner; a missing value is a dash. `breakdown`
    adds the time breakdown of learner and actors.
    """
    gate = _number(summary, "gate_acceptance")
    facts = [
        ("accuracy", _accuracy_change(summary)),
        ("wall time", duration(_number(summary, "wall_s"))),
        (
            "trained",
            f"{_counted(summary, 'policy_version', 'update')}"
            f" of {_counted(summary, 'completions_trained', 'completion')}"
            f"{_optimizer_updates(summary)}",
        ),
        (
            "generated",
            f"{_count(summary, 'tokens_generated')} tokens,"
            f" {count(_number(summary, 'tokens_per_s'))} tokens/s",
        ),
        ("gate", DASH if gate is None else f"{percent(gate)} of screened prompts continued"),
        (
            "staleness",
            f"mean {decimal(_number(summary, 'staleness_mean'), 2)},"
            f" max {_counted(summary, 'staleness_max', 'version')}",
        ),
    ]
    if (repeated := _number(summary, "updates_repeated")) is not None and repeated > 0:
        identical = count(_number(summary, "updates_repeated_alike"))
        text = f"{counted(repeated, 'update')} from the journal, {identical} bitwise identical"
        facts.append(("repeated", text))
    facts += _suites(summary.get("suites"))
    facts += _unscored(summary.get("verifier"))
    lines = [*textwrap.wrap(f"run ended: {summary.get('reason') or DASH}", 80), ""]
    lines += [f"  {name:<12}{text}" for name, text in facts]
    lines += ["", *_ledger_lines(summary.get("ledger")), ""]
    if breakdown:
        lines += [*_breakdown_lines(summary.get("breakdown")), ""]
    for diagnosis in _items(summary, "diagnoses"):
        lines += [*_paragraph("diagnosis", _diagnosis(diagnosis)), ""]
    for notice in _items(summary, "notices"):
        lines += [*_paragraph("note", str(notice)), ""]
    folder = summary.get("run_folder")
    lines.append(f"  {'files':<12}{folder or DASH}")
    if folder and summary.get("completed") is False:
        lines.append(resume_line(str(folder)))
    return "\n".join(lines) + "\n"


def _optimizer_updates(summary: Mapping[str, object]) -> str:
    """The number of optimizer updates, if it is not that of the updates."""
    made = _number(summary, "optimizer_updates")
    if made is None or made == _number(summary, "policy_version"):
        return ""
    return f", {counted(made, 'optimizer update')}"


def _unscored(outcomes: object) -> list[tuple[str, str]]:
    """The number of completions without a verdict, if there are any."""
    table = outcomes if isinstance(outcomes, Mapping) else {}
    counts = {outcome: _table(table, outcome).get("completions", 0) for outcome in table}
    unscored = {name: number for name, number in counts.items() if name != "scored" and number}
    if not unscored:
        return []
    parts = [counted(number, str(name)) for name, number in unscored.items()]
    return [("verifier", f"{', '.join(parts)} of {sum(counts.values()):,.0f} completions")]


def resume_line(run_folder: str) -> str:
    return f"  {'resume':<12}{resume_command(run_folder)}"


def resume_command(run_folder: str) -> str:
    """The command that resumes an unfinished run."""
    return f"speed-async train --resume {shlex.quote(run_folder)}"


def _items(summary: Mapping[str, object], key: str) -> list[object]:
    value = summary.get(key)
    return value if isinstance(value, list) else []


def _paragraph(label: str, text: str) -> list[str]:
    head = f"  {label:<12}"
    return textwrap.wrap(head + " ".join(text.split()), 80, subsequent_indent=" " * len(head))


def _diagnosis(diagnosis: object) -> str:
    """Text of a diagnosis, with the time at which it was resolved, if it was."""
    if not isinstance(diagnosis, Mapping):
        return str(diagnosis)
    text, version = str(diagnosis.get("text")), diagnosis.get("last_version")
    if diagnosis.get("active_at_end") is False:
        text += f" (resolved at {duration(diagnosis.get('last_s'))}, version {version})"
    return text


def _breakdown_lines(breakdown: object) -> list[str]:
    roles = breakdown if isinstance(breakdown, Mapping) else {}
    lines = [f"  {'time':<28}{'seconds':>12}{'share':>10}"]
    for role in roles:
        parts = _table(roles, role)
        total = sum(parts.values())
        lines.append(f"    {role}")
        for part, seconds in parts.items():
            share = percent(seconds / total) if total else DASH
            lines.append(f"      {part:<24}{decimal(seconds, 1):>12}{share:>10}")
    return lines


def _accuracy_change(summary: Mapping[str, object]) -> str:
    """Change from the first to the last measurement, which may be of an earlier version."""
    before, last = _number(summary, "accuracy_before"), _number(summary, "accuracy_last")
    if before is None or last is None:
        return DASH
    first_version = summary.get("accuracy_before_version")
    last_version = summary.get("accuracy_last_version")
    if first_version == last_version:
        return f"{_accuracy(before)} at version {first_version}, the only one measured"
    change = f"{_accuracy(before)} -> {_accuracy(last)}  ({100 * (last - before):+.1f} points)"
    is_final = _number(summary, "accuracy_after") is not None
    return change if is_final else f"{change} at version {last_version}, the last one measured"


def _accuracy(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f} %"


def _suites(suites: object) -> list[tuple[str, str]]:
    """Change of each suite other than the held-out prompts, and its best version."""
    named = suites if isinstance(suites, Mapping) else {}
    facts: list[tuple[str, str]] = []
    for name, suite in named.items():
        if name == HELD_OUT or not isinstance(suite, Mapping) or "last" not in suite:
            continue
        first, last, best = (suite[key] for key in ("first", "last", "best"))
        facts.append(
            (
                str(name)[:11],
                f"mean@{suite.get('num_samples')} {_accuracy(_number(first, 'mean'))} (version "
                f"{first.get('policy_version')}) -> {_accuracy(_number(last, 'mean'))} "
                f"({last.get('policy_version')}), best {_accuracy(_number(best, 'mean'))} "
                f"({best.get('policy_version')})",
            )
        )
    return facts


def _ledger_lines(ledger: object) -> list[str]:
    if not isinstance(ledger, Mapping):
        return [f"  {'ledger':<12}{DASH}"]
    groups, tokens = _table(ledger, "groups"), _table(ledger, "tokens")
    seen = dict.fromkeys((*groups, *tokens))
    ends = [end for end in ENDS if end in seen]
    ends += [end for end in seen if end not in ENDS and end != TOTAL]
    total = sum(int(tokens.get(end, 0)) for end in ends)
    lines = [f"  {'ledger':<16}{'groups':>12}{'tokens':>16}{'share':>10}"]
    for end in ends:
        share = percent(tokens[end] / total) if total and end in tokens else DASH
        lines.append(
            f"    {end.replace('_', ' '):<14}{_cell(groups, end):>12}{_cell(tokens, end):>16}"
            f"{share:>10}"
        )
    if TOTAL in seen:
        lines.append(f"    {TOTAL:<14}{_cell(groups, TOTAL):>12}{_cell(tokens, TOTAL):>16}")
    lines += _failure_lines(ledger, "failures", "failures")
    lines += _failure_lines(ledger, "held_out_failures", "held-out")
    return [*lines, *_balance_lines(ledger)]


def _failure_lines(ledger: Mapping[object, object], key: str, label: str) -> list[str]:
    """Each kind with its count, and its first example if it has details."""
    failures, examples = _table(ledger, key), ledger.get("failure_examples")
    if not failures:
        return []
    reasons = ", ".join(f"{reason} ({_cell(failures, reason)})" for reason in failures)
    lines = _paragraph(label, reasons if label == "failures" else f"failed: {reasons}")
    for kind in failures:
        example = examples.get(kind) if isinstance(examples, Mapping) else None
        if example and example != kind:
            first = textwrap.shorten(str(example), MAX_EXAMPLE_CHARS, placeholder=" ...")
            lines += _paragraph("", f"first: {first}")
    return lines


def _balance_lines(ledger: Mapping[object, object]) -> list[str]:
    checks = ledger.get("checks")
    named = checks if isinstance(checks, Mapping) else {}
    broken = [str(name) for name, holds in named.items() if not holds]
    if broken or ledger.get("closes") is False:
        return [f"  {'balanced':<12}NO", *(f"    violated: {name}" for name in broken)]
    if ledger.get("closes") is None:
        return [f"  {'balanced':<12}{DASH}"]
    return [f"  {'balanced':<12}yes" + (f" ({len(named)} checks passed)" if named else "")]


def _table(ledger: Mapping[object, object], name: str) -> dict[str, float]:
    table = ledger.get(name)
    if not isinstance(table, Mapping):
        return {}
    return {str(end): item for end, item in table.items() if isinstance(item, (int, float))}


def _cell(table: Mapping[str, float], end: str) -> str:
    return f"{int(table[end]):,}" if end in table else DASH


def _number(summary: Mapping[str, object], key: str) -> float | None:
    value = summary.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return finite(value)


def _counted(summary: Mapping[str, object], key: str, noun: str) -> str:
    return counted(_number(summary, key), noun)


def _count(summary: Mapping[str, object], key: str) -> str:
    number = _number(summary, key)
    return DASH if number is None else f"{number:,.0f}"
