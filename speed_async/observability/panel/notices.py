"""What the panel says in sentences: what is wrong, how the run ended, what happened."""

from collections.abc import Sequence

from rich.text import Text

from speed_async.observability.outcomes import told_outcome
from speed_async.observability.panel.layout import (
    ALWAYS,
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


def notice_lines(state: PanelState, layout: Layout, most: int) -> list[Line]:
    """The outcome, the diagnoses and the warnings, in at most `most` lines where that is two for
    each. What is too long lacks its middle: the remedy stands at its end."""
    notices = [(f"✗ {text}", ALARM) for text in state.diagnoses]
    notices += [(f"! {text}", "red") for text in state.warnings]
    if state.outcome is not None:
        text = told_outcome(state.outcome, state.reason)
        notices.insert(0, (text, OUTCOME_STYLES[state.outcome]))
    told = [wrapped(text, layout.inner, rest="  ") for text, _ in notices]
    shares = _shares([len(lines) for lines in told], most)
    return [
        Line(text=Text(line, style, no_wrap=True), rank=ALWAYS)
        for lines, share, (_, style) in zip(told, shares, notices, strict=True)
        for line in without_middle(lines, share)
    ]


def _shares(wanted: list[int], most: int) -> list[int]:
    """Lines for each: what it wants, or an equal part of what the shorter ones leave."""
    shares = dict.fromkeys(range(len(wanted)), 0)
    left, open_ones = most, sorted(shares, key=lambda index: wanted[index])
    while open_ones:
        index = open_ones.pop(0)
        shares[index] = max(2, min(wanted[index], left // (len(open_ones) + 1)))
        left -= shares[index]
    return [shares[index] for index in range(len(wanted))]


def event_lines(state: PanelState, ranks: Sequence[int]) -> list[Line]:
    """The newest recent_events, the last of which stays longest."""
    newest_first = list(reversed(state.recent_events))[: len(ranks)] or ["-"]
    lines = [
        Line(text=text_row("" if place else "last", Text(text)), rank=rank)
        for place, (text, rank) in enumerate(zip(newest_first, ranks, strict=False))
    ]
    return lines
