"""Rows of the panel about what the model learns: reward, held-out accuracy, suites."""

from rich.text import Text

from speed_async.observability.metrics import Value
from speed_async.observability.notation import count, decimal
from speed_async.observability.panel.glyphs import sparkline
from speed_async.observability.panel.histories import History
from speed_async.observability.panel.layout import LABEL, Layout, Line
from speed_async.observability.panel.state import PanelState, SuiteResults


def learning_rows(state: PanelState, layout: Layout) -> list[Line]:
    values = state.values
    reward = _history_row("reward", values.get("reward_mean"), "train", state.reward, state, layout)
    accuracy = _history_row(
        "accuracy", values.get("accuracy"), "held-out", state.accuracy, state, layout
    )
    suites = [_suite_row(name, results, state, layout) for name, results in state.suites.items()]
    return [
        Line(text=reward, rank=1),
        Line(text=accuracy, rank=2),
        *(Line(text=row, rank=12) for row in suites),
    ]


def _suite_row(name: str, results: SuiteResults, state: PanelState, layout: Layout) -> Text:
    """mean@k with the version that it is the result of, and the versions that sampled it."""
    values = results.last
    line = _sparkline(results.history, state, layout)
    oldest, newest = values.get("oldest_version"), values.get("newest_version")
    note = f"v{count(values.get('policy_version'))}"
    if layout.wide:
        note += f" ({count(oldest)}..{count(newest)}) best {decimal(results.history.best, 2)}"
    return layout.row(
        name[: LABEL - 1],
        decimal(values.get("mean"), 3),
        unit=f"mean@{count(values.get('num_samples'))}",
        graphic=Text(line, "green"),
        note=note,
    )


def _history_row(
    label: str, value: Value, unit: str, history: History, state: PanelState, layout: Layout
) -> Text:
    line = _sparkline(history, state, layout)
    reported = state.values.get("accuracy_before") if history is state.accuracy else None
    first = history.first if reported is None else reported
    best = f"best {decimal(history.best, 2)}"
    note = f"first {decimal(first, 2)}  {best}" if layout.wide else best
    return layout.row(label, decimal(value, 3), unit=unit, graphic=Text(line, "green"), note=note)


def _sparkline(history: History, state: PanelState, layout: Layout) -> str:
    numbers = [number for _, number in history.points]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    # The range is at least 0.1, so that noise does not look like progress.
    high = max(high, low + 0.1)
    return sparkline(
        history.points, layout.graphic, from_s=0.0, to_s=state.wall_s, low=low, high=high
    )
