"""Compares two evaluations on the same prompts by a paired bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.records import SampleRecord, read_records, samples_path
from speed_async.evaluation.results import by_prompt, majority_value, share_passed
from speed_async.evaluation.results_file import read_results
from speed_async.evaluation.statistics import Estimate, bootstrap_mean_of_means, paired_bootstrap

IDENTITY = ("suite_digest", "match", "verifier")
"""Settings that must be equal: the prompts, their answers, and how they are scored."""
NOT_COMPARED = ("model", "model_digest", "suite_path")
MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteDifference:
    """The second model minus the first, on one suite."""

    suite: str
    num_prompts: int
    num_samples: tuple[int, int]
    means: tuple[float, float]
    """mean@k of each model."""
    difference: Estimate
    majority_difference: Estimate | None
    """None unless both have the same number of samples, above 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    names: tuple[str, str]
    suites: tuple[SuiteDifference, ...]
    overall: Estimate
    """Mean over the suites of their differences; each suite has the same weight."""
    notes: tuple[str, ...]


def compare(first: Path, second: Path, suites: Sequence[str] = ()) -> Comparison:
    """Compare two folders of results. `suites` selects some of them; empty: all.

    Raises SpeedAsyncError when they are not on the same prompts, with the reason, and DataError for
    an unreadable folder.
    """
    results = read_results(first), read_results(second)
    names = _common_suites(first, second, results, suites)
    differences: list[SuiteDifference] = []
    per_prompt: list[list[float]] = []
    notes: list[str] = []
    for name in names:
        entries = results[0][name], results[1][name]
        _check_same_prompts(name, first, second, entries)
        notes += _different_settings(name, entries)
        prompts = _samples(first, name, entries[0]), _samples(second, name, entries[1])
        values = _differences(name, first, second, prompts)
        per_prompt.append(values)
        differences.append(_suite_difference(name, entries, prompts, values))
    return Comparison(
        names=(str(first), str(second)),
        suites=tuple(differences),
        overall=bootstrap_mean_of_means(per_prompt),
        notes=tuple(notes),
    )


def comparison_table(comparison: Comparison) -> RenderableType:
    """One row per suite, and one for all of them."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("suite", no_wrap=True)
    for heading in ("prompts", "A mean@k", "B mean@k", "B - A"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_votes = any(each.majority_difference for each in comparison.suites)
    if has_votes:
        table.add_column("maj@k, B - A", justify="right", no_wrap=True)
    for each in comparison.suites:
        k_first, k_second = each.num_samples
        k = str(k_first) if k_first == k_second else f"{k_first}/{k_second}"
        cells = [each.suite, f"{each.num_prompts:,} x {k}"]
        cells += [f"{100 * mean:.1f}" for mean in each.means]
        cells.append(_signed(each.difference))
        if has_votes:
            votes = each.majority_difference
            cells.append("-" if votes is None else _signed(votes))
        table.add_row(*cells)
    if len(comparison.suites) > 1:
        table.add_row("mean of suites", "", "", "", _signed(comparison.overall))
    lines = [f"A: {comparison.names[0]}", f"B: {comparison.names[1]}", ""]
    end = ["in % points, with 95 % intervals of a paired bootstrap over prompts", *comparison.notes]
    return Group(Text("\n".join(lines)), table, Text("\n".join(end)))


def _signed(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (100 * each for each in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _common_suites(
    first: Path,
    second: Path,
    results: tuple[dict[str, Any], dict[str, Any]],
    wanted: Sequence[str],
) -> list[str]:
    for folder, suites in zip((first, second), results, strict=True):
        missing = [name for name in wanted if name not in suites]
        if missing:
            raise SpeedAsyncError(
                f"--suite {missing[0]}: '{folder}' has no such suite; it has {_listed(suites)}"
            )
    if wanted:
        return list(dict.fromkeys(wanted))
    if results[0].keys() != results[1].keys():
        common = sorted(results[0].keys() & results[1].keys())
        remedy = (
            f"select those of both with --suite {','.join(common)}"
            if common
            else ("they have none in common")
        )
        raise SpeedAsyncError(
            f"the suites differ: '{first}' has {_listed(results[0])}, '{second}' has "
            f"{_listed(results[1])}; {remedy}"
        )
    return list(results[0])


def _check_same_prompts(
    name: str, first: Path, second: Path, entries: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    settings = entries[0]["settings"], entries[1]["settings"]
    reasons = {
        "suite_digest": "the prompts or answers are not the same",
        "match": "answers are matched in different ways",
        "verifier": "the scoring code is not the same",
    }
    for key in IDENTITY:
        if settings[0].get(key) != settings[1].get(key):
            raise SpeedAsyncError(
                f"suite '{name}' cannot be compared: {reasons[key]} ({key} is "
                f"{settings[0].get(key)!r} in '{first}' and {settings[1].get(key)!r} in "
                f"'{second}'): evaluate both on the same data with the same version"
            )
    for folder, entry in zip((first, second), entries, strict=True):
        if not entry["is_complete"]:
            raise SpeedAsyncError(
                f"suite '{name}' in '{folder}' is incomplete: run that evaluation again to continue"
            )


def _different_settings(name: str, entries: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    one, other = entries[0]["settings"], entries[1]["settings"]
    return [
        f"{name}: {key} is {one.get(key)!r} for A and {other.get(key)!r} for B"
        for key in sorted({*one, *other} - {*IDENTITY, *NOT_COMPARED})
        if one.get(key) != other.get(key)
    ]


def _samples(folder: Path, name: str, entry: dict[str, Any]) -> dict[int, list[SampleRecord]]:
    records = read_records(samples_path(folder, name))
    return by_prompt(each for each in records if each.sample < entry["num_samples"])


def _differences(
    name: str,
    first: Path,
    second: Path,
    prompts: tuple[dict[int, list[SampleRecord]], dict[int, list[SampleRecord]]],
) -> list[float]:
    """Difference of each prompt; NaN for one without a verdict in either evaluation."""
    if prompts[0].keys() != prompts[1].keys():
        odd = sorted(prompts[0].keys() ^ prompts[1].keys())
        raise SpeedAsyncError(
            f"suite '{name}' cannot be compared: {len(odd)} prompts are only in one of '{first}' "
            f"and '{second}' (ids {_listed(map(str, odd[:MAX_LISTED]))})"
        )
    return [share_passed(prompts[1][i]) - share_passed(prompts[0][i]) for i in prompts[0]]


def _suite_difference(
    name: str,
    entries: tuple[dict[str, Any], dict[str, Any]],
    prompts: tuple[dict[int, list[SampleRecord]], dict[int, list[SampleRecord]]],
    differences: Sequence[float],
) -> SuiteDifference:
    num_samples = entries[0]["num_samples"], entries[1]["num_samples"]
    match = entries[0]["settings"]["match"]
    both = [i for i, each in zip(prompts[0], differences, strict=True) if not math.isnan(each)]
    means = [
        sum(share_passed(each[i]) for i in both) / len(both) if both else math.nan
        for each in prompts
    ]
    votes = None
    if num_samples[0] == num_samples[1] > 1:
        votes = paired_bootstrap(
            [
                majority_value(prompts[1][i], match) - majority_value(prompts[0][i], match)
                for i in both
            ]
        )
    return SuiteDifference(
        suite=name,
        num_prompts=len(both),
        num_samples=num_samples,
        means=(means[0], means[1]),
        difference=paired_bootstrap(differences),
        majority_difference=votes,
    )


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
