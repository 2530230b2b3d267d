"""Text of the panel: warnings, diagnoses, the outcome and recent events."""

from collections.abc import Sequence

from rich.text import Text

from speed_async.observability.outcomes import outcome_sentence
from speed_async.observability.panel.layout import (
    LABEL,
    REQUIRED,
    Layout,
    Line,
    text_row,
    without_middle,
    wrapped,
)
from speed_async.observability.panel.state import PanelState

ALARM = "bold red"
OUTCOME_STYLES = {
    "completed": "bold green",
    "stopped": "bold blue",
    "nothing_learned": "bold magenta",
    "failed": ALARM,
}


def notice_lines(state: PanelState, layout: Layout, max_lines: int) -> list[Line]:
    """The outcome, the diagnoses and the warnings in at most `max_lines` lines, but at least two
    lines each. Long texts lose their middle, because the remedy is at the end."""
    notices = [(f"✗ {text}", ALARM) for text in state.diagnoses]
    notices += [(f"! {text}", "red") for text in state.warnings]
    if state.outcome is not None:
        text = outcome_sentence(state.outcome, state.reason)
        notices.insert(0, (text, OUTCOME_STYLES[state.outcome]))
    texts = [wrapped(text, layout.inner, rest="  ") for text, _ in notices]
    shares = _shares([len(lines) for lines in texts], max_lines)
    return [
        Line(text=Text(line, style, no_wrap=True), rank=REQUIRED)
        for lines, share, (_, style) in zip(texts, shares, notices, strict=True)
        for line in without_middle(lines, share)
    ]


def _shares(requested: list[int], max_lines: int) -> list[int]:
    """Lines per text: the requested number, or an equal share of what shorter texts leave."""
    shares = dict.fromkeys(range(len(requested)), 0)
    left, pending = max_lines, sorted(shares, key=lambda index: requested[index])
    while pending:
        index = pending.pop(0)
        shares[index] = max(2, min(requested[index], left // (len(pending) + 1)))
        left -= shares[index]
    return [shares[index] for index in range(len(requested))]


def event_lines(state: PanelState, layout: Layout, ranks: Sequence[int]) -> list[Line]:
    """The recent events, newest first, in full; `ranks` are those of the events."""
    newest_first = list(reversed(state.recent_events))[: len(ranks)] or ["-"]
    lines: list[Line] = []
    for place, (event, rank) in enumerate(zip(newest_first, ranks, strict=False)):
        for part, text in enumerate(wrapped(event, layout.inner - LABEL, rest="  ")):
            label = "" if place or part else "last"
            lines.append(Line(text=text_row(label, Text(text)), rank=rank))
    return lines
