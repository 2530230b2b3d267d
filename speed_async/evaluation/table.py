"""Results as tables for the terminal. Percentages, with 95 % confidence intervals."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from speed_async.evaluation.results import SuiteResult
from speed_async.evaluation.statistics import Estimate

CAPTION = (
    "in %; \u00b1: the larger side of the 95 % interval over prompts (results.json has both); "
    "tokens: mean length; trunc.: ended by a length limit; answer: an answer was extracted"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResults:
    """The suites of one model; `name` is empty when there is only one model."""

    name: str
    suites: tuple[SuiteResult, ...]


def results_table(models: Sequence[ModelResults]) -> RenderableType:
    """One row per model and suite, then the levels, then notes on what needs attention."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    has_names = any(model.name for model in models)
    has_votes = any(suite.num_samples > 1 for model in models for suite in model.suites)
    if has_names:
        table.add_column("model", no_wrap=True)
    table.add_column("suite", no_wrap=True)
    for heading in ("prompts", "mean@k", *(("pass@k", "maj@k") if has_votes else ()), "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("trunc.", "answer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        for suite in model.suites:
            cells = [suite.suite, f"{suite.num_prompts:,} x {suite.num_samples}", _cell(suite.mean)]
            if has_votes:
                cells += [
                    _percent(suite.pass_at[suite.num_samples].value),
                    _cell(suite.majority),
                ]
            cells += [
                _number(suite.tokens.mean),
                _percent(suite.truncated),
                _percent(suite.answered),
            ]
            table.add_row(*([model.name] if has_names else []), *cells)
    levels = [_levels(model, suite) for model in models for suite in model.suites if suite.levels]
    notes = [Text(note) for model in models for suite in model.suites for note in _notes(suite)]
    caption = Text(CAPTION, style="dim")
    return Group(table, caption, *levels, *notes)


def _levels(model: ModelResults, suite: SuiteResult) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(" ".join(filter(None, (model.name, suite.suite, "by level"))), no_wrap=True)
    for heading in ("prompts", "mean@k", "tokens", "trunc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for level in suite.levels:
        table.add_row(
            level.level or "(none)",
            f"{level.num_prompts:,}",
            _cell(level.mean),
            _number(level.mean_tokens),
            _percent(level.truncated),
        )
    return Group(Text(""), table)


def _notes(suite: SuiteResult) -> Iterator[str]:
    name, k = suite.suite, suite.num_samples
    if not suite.is_complete:
        expected = suite.num_prompts * k
        yield f"{name}: incomplete, {suite.num_completions:,} of {expected:,} completions"
    if suite.num_unscored:
        kinds = ", ".join(
            f"{count} {outcome}"
            for outcome, count in sorted(suite.outcomes.items())
            if outcome != "scored"
        )
        yield (
            f"{name}: {suite.num_unscored} completions without a verdict ({kinds}) are left out; "
            f"mean@{k} is {_percent(suite.mean_if_unscored_failed)} if all of them are wrong and "
            f"{_percent(suite.mean_if_unscored_passed)} if all are right"
        )
    if suite.num_ties:
        yield (
            f"{name}: maj@{k} has {suite.num_ties} ties; a tie counts as the share of the tied "
            "answers that is correct"
        )


def _cell(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    distance = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{_percent(estimate.value)} \u00b1{_percent(distance)}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"
