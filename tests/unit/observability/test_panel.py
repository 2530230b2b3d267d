import re

import pytest
from rich.cells import cell_len

from speed_async.observability.metrics import Event, Value
from speed_async.observability.panel.histories import HISTORY_LIMIT, History, Recent
from speed_async.observability.summary import STOPPING
from tests.fakes.panel_states import EVALUATION, GAUGES, full_state, shown, state_after


@pytest.mark.parametrize(
    ("width", "lag_s", "expected"),
    [
        (100, 0.0123, "service lag 12 ms"),
        (80, 0.0123, "service lag 12 ms"),
        (80, 1234.5, "service lag 1234.5 s"),
        (60, 0.0123, "lag 12 ms"),
        (60, 12.34, "lag 12.3 s"),
    ],
)
def test_service_lag_is_shown_in_full(width: int, lag_s: float, expected: str) -> None:
    state = state_after(Event(kind="step", values=GAUGES | {"loop_lag_s": lag_s}))
    [row] = [line for line in shown(state, width) if line.startswith("│ time")]
    assert "left 7m30s " in row
    assert f" {expected} " in row
    assert " lag " not in "".join(shown(full_state(), width)).replace("lag 3", "")


# --- state --------------------------------------------------------------------------------------


def test_state_keeps_first_best_and_last_of_reward_and_accuracy() -> None:
    state = state_after(
        *(
            Event(kind="step", values={"wall_s": at_s, "reward_mean": reward})
            for at_s, reward in ((1.0, 0.3), (2.0, 0.6), (3.0, 0.5), (4.0, float("nan")))
        ),
        Event(kind="status", values={"wall_s": 5.0, "reward_mean": 0.9, "accuracy": None}),
        Event(kind="evaluation", values=EVALUATION),
    )
    assert state.reward.points == [(1.0, 0.3), (2.0, 0.6), (3.0, 0.5)]
    assert (state.reward.first, state.reward.best, state.reward.last) == (0.3, 0.6, 0.5)
    assert state.accuracy.points == [(60.0, 0.52)]
    assert state.recent_events[-1] == "1m00s  held-out 0.520 at v10, 133/256 passed"


def test_evaluation_of_an_older_version_does_not_lower_the_version() -> None:
    assert full_state().values["policy_version"] == 12


def test_end_event_sets_outcome_and_reason() -> None:
    end: dict[str, Value] = {"wall_s": 70.0, "ok": False, "reason": "actor-1:\x1b[2J lost"}
    state = state_after(Event(kind="status", values=GAUGES), Event(kind="end", values=end))
    assert (state.outcome, state.reason) == ("failed", "actor-1: [2J lost")
    assert state.values["eta_s"] is None
    assert state.recent_events[-1] == "1m10s  failed: actor-1: [2J lost"


def test_a_long_history_is_halved_by_averaging_neighbours() -> None:
    history = History()
    for index in range(HISTORY_LIMIT):
        history.add(float(index), index % 2)
    assert len(history.points) == HISTORY_LIMIT // 2
    assert history.points[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert (history.first, history.best, history.last) == (0, 1, 1)


def test_recent_rates_expire_after_two_minutes_but_keep_the_peak() -> None:
    recent = Recent()
    for at_s, rate in ((0.0, 900.0), (60.0, 500.0), (120.0, 600.0)):
        recent.add(at_s, rate)
    assert recent.points == [(60.0, 500.0), (120.0, 600.0)]
    assert recent.peak == 900.0


def test_busy_slots_are_a_mean_of_the_last_ten_seconds() -> None:
    def status(at_s: float, busy: int | None, slots: int | None = 400) -> Event:
        gauges: dict[str, Value] = {"actors_slots_busy": busy, "actors_slots": slots}
        return Event(kind="status", values=GAUGES | gauges | {"wall_s": at_s})

    def slots_shown(*events: Event) -> str:
        [row] = [each for each in shown(state_after(*events), 100) if each.startswith("│ actors")]
        return row

    events = [status(0.0, 400), *(status(20.0 + i, 400 * (i % 2)) for i in range(10))]
    assert " 200 of 400 slots" in slots_shown(*events)
    assert " 100 of 200 slots" in slots_shown(*events, status(29.5, 100, 200))
    assert " - of - slots" in slots_shown(*events, status(31.0, None, None))


@pytest.mark.parametrize("width", [60, 100])
def test_a_long_warning_is_whole_among_the_recent_events_after_it_was_closed(width: int) -> None:
    warned = Event(kind="status", values=GAUGES | {"warning": STOPPING})
    state = state_after(warned, Event(kind="end", values={"wall_s": 70.0, "reason": "stopped"}))
    state.update(Event(kind="status", values=GAUGES | {"warning": ""}))
    text = " ".join(" ".join(line.strip("│ ") for line in shown(state, width)).split())
    assert STOPPING in text


# --- rendering ------------------------------------------------------------------------------------

VALUES = (
    *("12/100", "1m02s", "7m30s", "training"),
    *("0.410", "0.520", "best 0.52", "5,300", "2,100", "38 %"),
    *("16/64", "48 prompts", "limit 96", "0.80", "max 2", "learner 60%", "actor 20%", "sync 10%"),
    *("1/2 newest", "lag 3"),
    *("✓ balances", "held-out 0.520 at v10"),
)


@pytest.mark.parametrize("width", [60, 100])
def test_the_share_of_checkpoints_is_shown_when_they_take_time(width: int) -> None:
    def legend(share: float) -> str:
        values: dict[str, Value] = {"share_learner": 0.6 - share, "share_checkpoint": share}
        lines = shown(state_after(Event(kind="status", values=GAUGES | values)), width, 40)
        return " ".join(line.strip("│ ") for line in lines if any(c in line for c in "▓░▚"))

    assert "learner 45%  ░ sync 10%" in legend(0.15)
    assert legend(0.15).endswith("▚ checkpoint 15%")
    assert "checkpoint" not in legend(0.0)


@pytest.mark.parametrize(
    ("width", "height", "num_lines"), [(60, 20, 18), (80, 24, 22), (120, 40, 25)]
)
def test_panel_shows_every_value_and_fits_the_terminal(
    width: int, height: int, num_lines: int
) -> None:
    lines = shown(full_state(), width, height)
    assert {cell_len(line) for line in lines} == {width}
    assert len(lines) == num_lines < height
    text = "\n".join(lines)
    assert [value for value in VALUES if value not in text] == []
    assert "runs/[red]demo[/red]" in text


def test_wide_panel_shows_full_notes() -> None:
    text = "\n".join(shown(full_state(), 80))
    assert "first 0.28  best 0.52" in text
    assert " 12 %  training" in text
    assert " 25 % full" in text
    assert "limit 96 currently" in text
    assert "pause 12 ms  lag 3" in text


def test_very_narrow_panel_is_rendered() -> None:
    for width in range(24, 60):
        assert max(cell_len(line) for line in shown(full_state(), width)) <= width


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"wall_s": None, "phase": None, "policy_version": "x", "updates_total": 0},
        {"wall_s": float("nan"), "buffer_groups": 3, "buffer_capacity": 0, "share_actor": -1.0},
        dict.fromkeys(GAUGES),
    ],
)
def test_missing_and_invalid_values_are_dashes(values: dict[str, Value]) -> None:
    state = state_after(
        Event(kind="status", values=values),
        Event(kind="step", values=values),
        Event(kind="evaluation", values=values),
    )
    lines = shown(state, 80)
    assert {cell_len(line) for line in lines} == {80}
    (reward,) = [line for line in lines if "reward" in line]
    assert re.search(r"reward +- train", reward)


def test_problems_are_shown_as_text_not_only_as_colour() -> None:
    problems: dict[str, Value] = {
        "ledger_closes": False,
        "warning": "actor-1.0 lost\nrestart 1 of 3",
        "actors_alive": 1,
        "actors_total": 2,
        "max_staleness": 1,
    }
    text = "\n".join(shown(state_after(Event(kind="status", values=GAUGES | problems)), 80))
    assert "✗ does not balance" in text
    assert "! actor-1.0 lost" in text
    assert "! restart 1 of 3" in text
    assert re.search(r"actors +1/2 MISSING", text)
    assert "max 2 of 1" in text


def test_no_color_keeps_text_without_colour_codes() -> None:
    plain = "\n".join(shown(full_state(), 80))
    coloured = "\n".join(
        shown(full_state(), 80, force_terminal=True, color_system="standard", no_color=False)
    )
    no_color = "\n".join(
        shown(full_state(), 80, force_terminal=True, color_system="standard", no_color=True)
    )
    colour_code = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)m")
    assert colour_code.search(coloured)
    assert not colour_code.search(no_color)
    assert re.sub(r"\x1b\[[\d;]*m", "", no_color) == plain


def test_notes_are_aligned_in_one_column() -> None:
    lines = shown(full_state(), 80)
    notes = ("- of - slots", "first 0.28", "peak 5,300", "of prompts", " 25 % full", "max 2")
    columns = [line.index(note) for note in notes for line in lines if note in line]
    assert columns == [56] * len(notes)
