"""Events and states that panel tests share."""

import io
from typing import Any

from rich.console import Console

from speed_async.observability.metrics import Event, Value
from speed_async.observability.panel.state import PanelState
from speed_async.observability.panel.view import render

GAUGES: dict[str, Value] = {
    "wall_s": 62.0,
    "policy_version": 12,
    "updates_total": 100,
    "generated_tokens_per_s": 5300.0,
    "trained_tokens_per_s": 2100.0,
    "gate_acceptance": 0.38,
    "buffer_groups": 16,
    "buffer_capacity": 64,
    "in_flight_groups": 48,
    "credits": 96,
    "staleness_mean": 0.8,
    "staleness_max": 2,
    "actors_alive": 2,
    "reward_mean": 0.41,
    "accuracy": None,
    "bottleneck": "learner",
    "eta_s": 450.0,
    "share_actor": 0.2,
    "share_buffer": 0.1,
    "share_learner": 0.6,
    "share_sync": 0.1,
    "ledger_closes": True,
    "phase": "training",
    "weights/newest": 1,
    "weights/lag_max": 3,
    "weights/pause_max_s": 0.0125,
}


EVALUATION: dict[str, Value] = {
    "wall_s": 60.0,
    "policy_version": 10,
    "accuracy": 0.52,
    "num_passed": 133,
    "num_completions": 256,
}


def state_after(*events: Event) -> PanelState:
    state = PanelState("runs/[red]demo[/red]")
    for event in events:
        state.update(event)
    return state


def shown(
    state: PanelState,
    width: int,
    height: int | None = None,
    *,
    view: Any = "figures",
    page: int = 0,
    keys: str = "",
    silent_s: float = 0.0,
    **console: Any,
) -> list[str]:
    stream = io.StringIO()
    panel = render(state, width, height, view=view, page=page, keys=keys, silent_s=silent_s)
    Console(file=stream, width=width, **console).print(panel)
    return stream.getvalue().splitlines()


def full_state() -> PanelState:
    return state_after(
        Event(kind="evaluation", values=EVALUATION | {"wall_s": 1.0, "accuracy": 0.28}),
        Event(kind="step", values=GAUGES | {"wall_s": 30.0, "reward_mean": 0.3}),
        Event(kind="evaluation", values=EVALUATION),
        Event(kind="step", values=GAUGES),
    )
