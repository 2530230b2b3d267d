"""The panel's sections, each a few rows made from the state.

Colour is never alone in saying something, and no colour is used that vanishes on a light ground.
"""

import textwrap

from rich.text import Text

from speed_async.observe.glyphs import SHARE_GLYPHS, bar, sparkline, stacked_bar
from speed_async.observe.metrics import Value
from speed_async.observe.notation import (
    DASH,
    count,
    decimal,
    duration,
    finite,
    percent,
    single_line,
)
from speed_async.observe.panel_layout import FIGURE, GAP, LABEL, Layout, text_row
from speed_async.observe.panel_state import RECENT_S, History, PanelState, Recent

ALARM = "bold red"
MAX_WARNING_LINES = 3
LATE_S = 0.25
"""A service whose loop comes this late is too busy."""
ROLES = ("actor", "buffer", "learner", "sync")
ROLE_STYLES = ("cyan", "blue", "green", "magenta")


def progress_rows(state: PanelState, layout: Layout) -> list[Text]:
    values = state.values
    done, total = finite(values.get("policy_version")), finite(values.get("updates_total"))
    share = done / total if done is not None and total else None
    alive, wanted = values.get("actors_alive"), values.get("actors_total")
    lost = (finite(alive) or 0) < (finite(wanted) or 0)
    actors = count(alive) + (f"/{count(wanted)}" if wanted is not None else "")
    return [
        layout.row(
            "updates",
            f"{count(done)}/{count(total)}",
            graphic=bar(share, layout.graphic, "green"),
            note=Text.assemble(
                (f"{percent(share):>5}  " if layout.wide else "", "bold"), _phase(state)
            ),
        ),
        layout.row(
            "time",
            duration(values.get("wall_s")),
            graphic=_time_left(state),
            note=Text(f"actors {actors}", ALARM if lost else "dim"),
        ),
    ]


def _time_left(state: PanelState) -> Text:
    """And how late the service's loop is: whatever waits for the service waits that long."""
    if state.ended_ok is not None:
        return Text("")
    told = Text(f"left {duration(state.values.get('eta_s'))}")
    lag_s = finite(state.values.get("loop_lag_s"))
    if lag_s is not None:
        style = ALARM if lag_s > LATE_S else "dim"
        told.append(f"  service lag {count(1000 * lag_s)} ms", style)
    return told


def _phase(state: PanelState) -> Text:
    if state.ended_ok is None:
        phase = state.values.get("phase")
        return Text(single_line(phase), "cyan")
    return Text("finished", "bold green") if state.ended_ok else Text("failed", ALARM)


def learning_rows(state: PanelState, layout: Layout) -> list[Text]:
    values = state.values
    return [
        _history_row("reward", values.get("reward_mean"), "train", state.reward, state, layout),
        _history_row("accuracy", values.get("accuracy"), "held-out", state.accuracy, state, layout),
    ]


def _history_row(
    label: str, value: Value, unit: str, history: History, state: PanelState, layout: Layout
) -> Text:
    figures = [number for _, number in history.points]
    low, high = (min(figures), max(figures)) if figures else (0.0, 1.0)
    # A tenth at least from bottom to top: noise must not look like progress.
    high = max(high, low + 0.1)
    line = sparkline(
        history.points, layout.graphic, from_s=0.0, to_s=state.wall_s, low=low, high=high
    )
    told = state.values.get("accuracy_before") if history is state.accuracy else None
    first = history.first if told is None else told
    best = f"best {decimal(history.best, 2)}"
    note = f"first {decimal(first, 2)}  {best}" if layout.wide else best
    return layout.row(label, decimal(value, 3), unit=unit, graphic=Text(line, "green"), note=note)


def rate_rows(state: PanelState, layout: Layout) -> list[Text]:
    gate = finite(state.values.get("gate_acceptance"))
    return [
        _rate_row("generated", "generated_tokens_per_s", state.generated, state, layout),
        _rate_row("trained", "trained_tokens_per_s", state.trained, state, layout),
        layout.row(
            "gate",
            percent(gate),
            graphic=bar(gate, layout.graphic, "cyan"),
            note="of prompts continued" if layout.wide else "continued",
        ),
    ]


def _rate_row(label: str, key: str, recent: Recent, state: PanelState, layout: Layout) -> Text:
    from_s = max(0.0, state.wall_s - RECENT_S)
    high = max((rate for _, rate in recent.points), default=0.0)
    line = sparkline(
        recent.points, layout.graphic, from_s=from_s, to_s=state.wall_s, low=0.0, high=high
    )
    return layout.row(
        label,
        count(state.values.get(key)),
        unit="tok/s",
        graphic=Text(line, "cyan"),
        note=f"peak {count(recent.peak)}",
    )


def flow_rows(state: PanelState, layout: Layout) -> list[Text]:
    values = state.values
    mean, maximum = values.get("staleness_mean"), values.get("staleness_max")
    bound = finite(values.get("max_staleness"))
    over = bound is not None and (finite(maximum) or 0) > bound
    stale = f"max {count(maximum)}" + (f" of {count(bound)}" if bound is not None else "")
    mean_share = _ratio(mean, bound if bound is not None else maximum)
    return [
        _fill_row("buffer", values, "buffer_groups", "buffer_capacity", "full", layout),
        _fill_row("in flight", values, "in_flight_groups", "credits", "of credits", layout),
        layout.row(
            "staleness",
            decimal(mean, 2),
            unit="mean",
            graphic=bar(mean_share, layout.graphic, "blue"),
            note=Text(stale, ALARM if over else "dim"),
        ),
        _weights_row(values, layout),
    ]


def _weights_row(values: dict[str, Value], layout: Layout) -> Text:
    """How many actors hold the newest version, and how far the last one is behind."""
    holders, alive = values.get("weights/newest"), values.get("actors_alive")
    pause_s = finite(values.get("weights/pause_max_s"))
    pause = f"pause {count(1000 * pause_s)} ms  " if layout.wide and pause_s is not None else ""
    return layout.row(
        "weights",
        f"{count(holders)}/{count(alive)}",
        unit="newest",
        graphic=bar(_ratio(holders, alive), layout.graphic, "blue"),
        note=f"{pause}lag {count(values.get('weights/lag_max'))}",
    )


def _fill_row(
    label: str, values: dict[str, Value], held: str, ceiling: str, word: str, layout: Layout
) -> Text:
    share = _ratio(values.get(held), values.get(ceiling))
    return layout.row(
        label,
        f"{count(values.get(held))}/{count(values.get(ceiling))}",
        graphic=bar(share, layout.graphic, "blue"),
        note=f"{percent(share):>5} {word}" if layout.wide else word,
    )


def _ratio(part: Value, whole: Value) -> float | None:
    numerator, denominator = finite(part), finite(whole)
    if numerator is None or denominator is None:
        return None
    return numerator / denominator if denominator else 0.0


def bottleneck_rows(state: PanelState, layout: Layout) -> list[Text]:
    shares = [finite(state.values.get(f"share_{role}")) for role in ROLES]
    legend = Text(no_wrap=True)
    for role, share, glyph, style in zip(ROLES, shares, SHARE_GLYPHS, ROLE_STYLES, strict=True):
        legend.append(glyph, style).append(f" {role} ", "dim")
        legend.append(percent(share).replace(" ", "")).append("  ")
    bottleneck = single_line(state.values.get("bottleneck"))
    bar_width = layout.inner - LABEL - FIGURE - 2 * GAP
    head = Text(no_wrap=True)
    head.append("bound by".ljust(LABEL), "dim").append(bottleneck.rjust(FIGURE), "bold")
    head.append("  ").append_text(stacked_bar(shares, ROLE_STYLES, bar_width))
    lines = [head, legend, _ledger_row(state)]
    lines.append(text_row("last", Text(state.last_event or DASH)))
    return lines


def warning_rows(state: PanelState, layout: Layout, most: int) -> list[Text]:
    """The warning in at most `most` lines, the last one open where there is more of it."""
    warning = state.values.get("warning")
    if not warning or most < 1:
        return []
    first, *others = textwrap.wrap(f"! {single_line(warning)}", layout.inner - LABEL)
    told = [first, *others[: most - 1]]
    if rest := others[most - 1 :]:
        told[-1] = " ".join([told[-1], *rest])
    labels = ["warning", *[""] * len(others)]
    return [text_row(label, Text(part, ALARM)) for label, part in zip(labels, told, strict=False)]


def _ledger_row(state: PanelState) -> Text:
    closes = state.values.get("ledger_closes")
    if closes is None:
        return text_row("ledger", Text(DASH))
    if closes:
        return text_row("ledger", Text("✓ closes: every token is accounted for", "green"))
    return text_row("ledger", Text("✗ does not close: tokens are unaccounted for", ALARM))
