"""Rows of metrics of the panel, by section, with ranks for small terminals.

No information is conveyed by colour alone, and all colours are readable on a light background.
"""

from collections.abc import Sequence

from rich.text import Text

from speed_async.observability.metrics import Value
from speed_async.observability.notation import (
    DASH,
    count,
    decimal,
    duration,
    finite,
    percent,
    single_line,
)
from speed_async.observability.outcomes import OUTCOMES
from speed_async.observability.panel.glyphs import SHARE_GLYPHS, bar, sparkline, stacked_bar
from speed_async.observability.panel.histories import RECENT_S, Recent
from speed_async.observability.panel.layout import (
    FIGURE,
    GAP,
    LABEL,
    REQUIRED,
    Layout,
    Line,
    text_row,
)
from speed_async.observability.panel.notices import ALARM, OUTCOME_STYLES
from speed_async.observability.panel.state import ACTOR_LAG, PanelState, actors_alive_text

LATE_S = 0.25
"""Loop delay from which the service is considered overloaded."""
SILENT_S = 3.0
"""Time without events from which the panel shows a note."""
ROLES = ("actor", "buffer", "learner", "sync", "checkpoint")
ROLE_STYLES = ("cyan", "blue", "green", "magenta", "yellow")


def progress_rows(state: PanelState, layout: Layout, silent_s: float) -> list[Line]:
    """`silent_s` is the time since the last event, on the local clock."""
    values = state.values
    done, total = finite(values.get("policy_version")), finite(values.get("updates_total"))
    share = done / total if done is not None and total else None
    phase = Text.assemble((f"{percent(share):>5}  " if layout.wide else "", "bold"), _phase(state))
    progress = layout.row(
        "updates",
        f"{count(done)}/{count(total)}",
        graphic=bar(share, layout.graphic, "green"),
        note=phase,
    )
    left = f"left {duration(values.get('eta_s'))}" if state.outcome is None else ""
    time = layout.row(
        "time",
        duration(values.get("wall_s")),
        graphic=Text(left),
        note=_service_lag(values, layout),
    )
    lines = [Line(text=progress), Line(text=time)]
    stage = _stage(state, silent_s)
    if stage is not None:
        lines.append(Line(text=text_row("stage", stage)))
    return [*lines, Line(text=_actors_row(state, layout), rank=3)]


def _actors_row(state: PanelState, layout: Layout) -> Text:
    values = state.values
    alive, expected = finite(values.get("actors_alive")), finite(values.get("actors_total"))
    is_running = state.outcome is None and state.had_actors
    is_missing = (alive or 0) < (expected or 0) and is_running
    slots = finite(values.get("actors_slots"))
    share = state.share_busy.mean if slots else None
    busy = None if slots is None or share is None else share * slots
    note = f"{count(busy)} of {count(slots)} slots" if layout.wide else "slots busy"
    return layout.row(
        "actors",
        actors_alive_text(values),
        unit="MISSING" if is_missing else "alive",
        graphic=bar(share, layout.graphic, "cyan"),
        note=note,
        style=ALARM if is_missing else "bold",
    )


def _service_lag(values: dict[str, Value], layout: Layout) -> Text:
    """Delay of the service loop, which delays every request to the service."""
    lag_s = finite(values.get("loop_lag_s"))
    if lag_s is None:
        return Text("")
    delay = f"{1000 * lag_s:.0f} ms" if lag_s < 1 else f"{lag_s:.1f} s"
    label = "service lag" if layout.wide else "lag"
    return Text(f"{label} {delay}", ALARM if lag_s > LATE_S else "dim")


def _stage(state: PanelState, silent_s: float) -> Text | None:
    """Activity between updates with its duration, or a note that the feed is silent."""
    values = state.values
    if state.outcome is not None:
        return None
    if not values:
        return Text(f"waiting for the run's first event, {silent_s:.0f} s", "cyan")
    if silent_s >= SILENT_S:
        return Text(f"no event from the run for {silent_s:.0f} s", ALARM)
    phase, stage = values.get("phase"), ""
    if phase == "starting":
        stage = f"{actors_alive_text(values)} actors alive"
        if values.get("learner_here") is False:
            stage = f"learner loads the model, {stage}"
    elif phase == "evaluating":
        which = "first evaluation" if values.get("accuracy_before") is None else "last evaluation"
        done, total = values.get("evaluated_prompts"), values.get("evaluation_prompts")
        stage = which if total is None else f"{which}, {count(done)} of {count(total)} prompts"
    elif phase == "draining":
        stage = "actors finish running work"
    if not stage:
        return None
    return Text(f"{stage}, {duration(state.wall_s - state.stage_since_s)}", "cyan")


def _phase(state: PanelState) -> Text:
    if state.outcome is None:
        return Text(single_line(state.values.get("phase")), "cyan")
    return Text(OUTCOMES[state.outcome], OUTCOME_STYLES[state.outcome])


def rate_rows(state: PanelState, layout: Layout) -> list[Line]:
    share = finite(state.values.get("gate_acceptance"))
    gate = layout.row(
        "gate",
        percent(share),
        graphic=bar(share, layout.graphic, "cyan"),
        note="of prompts continued" if layout.wide else "continued",
    )
    generated = _rate_row("generated", "generated_tokens_per_s", state.generated, state, layout)
    trained = _rate_row("trained", "trained_tokens_per_s", state.trained, state, layout)
    return [Line(text=generated, rank=4), Line(text=trained, rank=9), Line(text=gate, rank=5)]


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


def flow_rows(state: PanelState, layout: Layout) -> list[Line]:
    values = state.values
    mean, maximum = values.get("staleness_mean"), values.get("staleness_max")
    bound = finite(values.get("max_staleness"))
    over = bound is not None and (finite(maximum) or 0) > bound
    note = f"max {count(maximum)}" + (f" of {count(bound)}" if bound is not None else "")
    staleness = layout.row(
        "staleness",
        decimal(mean, 2),
        unit="mean",
        graphic=bar(_ratio(mean, bound if bound is not None else maximum), layout.graphic, "blue"),
        note=Text(note, ALARM if over else "dim"),
    )
    return [
        Line(text=_buffer_row(values, layout), rank=6),
        Line(text=_in_flight_row(values, layout), rank=10),
        Line(text=staleness, rank=8),
        Line(text=_weights_row(values, layout), rank=13),
    ]


def _buffer_row(values: dict[str, Value], layout: Layout) -> Text:
    held, capacity = values.get("buffer_groups"), values.get("buffer_capacity")
    share = _ratio(held, capacity)
    return layout.row(
        "buffer",
        f"{count(held)}/{count(capacity)}",
        graphic=bar(share, layout.graphic, "blue"),
        note=f"{percent(share):>5} full" if layout.wide else "full",
    )


def _in_flight_row(values: dict[str, Value], layout: Layout) -> Text:
    """The limit varies with the gate and the buffer, so it is not shown as a denominator."""
    held, limit = values.get("in_flight_groups"), values.get("credits")
    return layout.row(
        "in flight",
        count(held),
        unit="prompts",
        graphic=bar(_ratio(held, limit), layout.graphic, "blue"),
        note=f"limit {count(limit)}" + (" currently" if layout.wide else ""),
    )


def _weights_row(values: dict[str, Value], layout: Layout) -> Text:
    """Number of actors with the newest version, and the largest lag."""
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


def _ratio(part: Value, whole: Value) -> float | None:
    numerator, denominator = finite(part), finite(whole)
    if numerator is None or denominator is None:
        return None
    return numerator / denominator if denominator else 0.0


def bottleneck_rows(state: PanelState, layout: Layout) -> list[Line]:
    shares = [finite(state.values.get(f"share_{role}")) for role in ROLES]
    bottleneck = single_line(state.values.get("bottleneck"))
    bar_width = layout.inner - LABEL - FIGURE - 2 * GAP
    head = Text(no_wrap=True)
    head.append("bound by".ljust(LABEL), "dim").append(bottleneck.rjust(FIGURE), "bold")
    head.append("  ").append_text(stacked_bar(shares, ROLE_STYLES, bar_width))
    ledger_rank = REQUIRED if state.values.get("ledger_closes") is False else 12
    return [
        Line(text=head, rank=7),
        *(Line(text=legend, rank=14) for legend in _share_legends(shares, layout)),
        Line(text=_ledger_row(state), rank=ledger_rank),
    ]


def _share_legends(shares: Sequence[float | None], layout: Layout) -> list[Text]:
    """As many rows as the shares need. Checkpoints are left out unless they take time."""
    rows = [Text(no_wrap=True)]
    for role, share, glyph, style in zip(ROLES, shares, SHARE_GLYPHS, ROLE_STYLES, strict=True):
        if role == "checkpoint" and not share:
            continue
        figure = percent(share).replace(" ", "")
        entry = Text.assemble((glyph, style), (f" {role} ", "dim"), f"{figure}  ")
        if rows[-1].cell_len + entry.cell_len > layout.inner:
            rows.append(Text(no_wrap=True))
        rows[-1].append_text(entry)
    return rows


def _ledger_row(state: PanelState) -> Text:
    balances = state.values.get("ledger_closes")
    if balances is None:
        return text_row("ledger", Text(DASH))
    if balances:
        return text_row("ledger", Text("✓ balances: every token is accounted for", "green"))
    return text_row("ledger", Text("✗ does not balance: tokens are unaccounted for", ALARM))


def actor_rows(state: PanelState, layout: Layout, ranks: range) -> list[Line]:
    """Weight version of each reporting actor, in at most `len(ranks)` rows."""
    newest = finite(state.values.get("policy_version"))
    lags = {
        key.removeprefix(ACTOR_LAG): finite(value)
        for key, value in state.values.items()
        if key.startswith(ACTOR_LAG)
    }
    named = sorted(lags.items(), key=_by_index)
    num_left_out = len(named) - len(ranks)
    shown = named if num_left_out <= 0 else named[: len(ranks) - 1]
    rows = [_actor_row(name, lag, newest, layout) for name, lag in shown]
    if num_left_out > 0:
        rows.append(text_row("", Text(f"and {num_left_out + 1} more", "dim")))
    return [Line(text=row, rank=rank) for row, rank in zip(rows, ranks, strict=False)]


def _actor_row(name: str, lag: float | None, newest: float | None, layout: Layout) -> Text:
    held = None if lag is None or newest is None else newest - lag
    share = None if held is None else (held / newest if newest else 1.0)
    note = "no weights yet" if lag is None else f"{count(lag)} behind"
    graphic = bar(share, layout.graphic, "blue")
    return layout.row(name, f"v{count(held)}", unit="", graphic=graphic, note=note)


def _by_index(item: tuple[str, float | None]) -> tuple[int, str]:
    index = item[0].rpartition("-")[2]
    return (int(index) if index.isdecimal() else 0, item[0])
