"""The panel on terminals of all sizes, and its reduction on small terminals."""

import itertools
import re

import pytest
from rich.cells import cell_len

from speed_async.buffer.reporting.rules import gate_starves
from speed_async.config.sections.gate import GateConfig
from speed_async.observability.metrics import Event, Value
from speed_async.observability.panel.state import PanelState
from tests.fakes.panel_samples import SAMPLE
from tests.fakes.panel_states import EVALUATION, GAUGES, full_state, shown, state_after

SIZES = [(60, 15), (61, 16), (80, 24), (100, 30), (120, 40), (200, 60), (300, 100)]
DIAGNOSES = (
    "All rewards are 0: none of the last 640 completions passed, since version 3 (2m10s ago). "
    "Change: easier prompts, or look at three samples (key s) and at how they are scored.\n"
    "All completions are cut off at 8 tokens, since version 1 (3m00s ago). Change: raise "
    "actors.max_new_tokens."
)
WARNING = "actor-1 was killed; its supervisor starts it again"


def busy_state() -> PanelState:
    """A state with every row and notice."""
    gauges: dict[str, Value] = GAUGES | {
        "actors_total": 3,
        "actors_slots": 512,
        "actors_slots_busy": 480,
        "loop_lag_s": 0.012,
        "max_staleness": 2,
        "diagnoses": DIAGNOSES,
        "warning": WARNING,
    }
    gauges |= {f"weights/lag/actor-{index}": index % 3 for index in range(1, 41)}
    events = [Event(kind="step", values=gauges | {"wall_s": 2.0 + at}) for at in range(60)]
    evaluations = [Event(kind="evaluation", values=EVALUATION | {"wall_s": at}) for at in range(30)]
    return state_after(*evaluations, *events, *[Event(kind="sample", values=SAMPLE)] * 4)


def inner_text(lines: list[str]) -> str:
    """The text inside the frame as one line."""
    return " ".join(" ".join(line.strip("│╭╮╰╯─") for line in lines).split())


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("view", ["figures", "samples", "help"])
def test_panel_never_exceeds_the_terminal(width: int, height: int, view: str) -> None:
    for state in (PanelState("demo"), full_state(), busy_state()):
        for page in range(5):
            lines = shown(state, width, height, view=view, page=page, keys="h help", silent_s=9.0)
            assert {cell_len(line) for line in lines} == {width}
            assert len(lines) < height


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_problems_are_shown_in_full_on_the_smallest_terminal(width: int, height: int) -> None:
    text = inner_text(shown(busy_state(), width, height))
    for notice in (*DIAGNOSES.split("\n"), WARNING):
        assert notice in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_long_notices_keep_their_beginning_and_remedy(width: int, height: int) -> None:
    diagnoses: dict[str, Value] = {
        "diagnoses": "\n".join(
            f"Fault {n}: {'a long explanation follows. ' * 60}Change: field_{n}" for n in range(3)
        )
    }
    text = inner_text(
        shown(state_after(Event(kind="status", values=GAUGES | diagnoses)), width, height)
    )
    for number in range(3):
        assert f"Fault {number}: a long" in text
        assert f"Change: field_{number}" in text


def test_gate_diagnosis_shows_its_remedy_on_the_smallest_terminal() -> None:
    finding = gate_starves(num_screened=14905, acceptance=0.0, pass_rate=0.0, gate=GateConfig())
    diagnosis = f"{finding.facts}. Change: {finding.change}"
    values: dict[str, Value] = GAUGES | {"diagnoses": diagnosis}
    text = inner_text(shown(state_after(Event(kind="status", values=values)), 60, 15))
    assert diagnosis in text


def test_small_terminal_keeps_the_most_important_rows() -> None:
    lines = shown(full_state(), 60, 15)
    labels = [line[2:12].strip() for line in lines[1:-1]]
    assert labels == [
        *("updates", "time", "actors", "reward", "accuracy", "generated", "trained", "gate"),
        *("buffer", "in flight", "staleness", "bound by"),
    ]


def test_unbalanced_ledger_is_shown_on_the_smallest_terminal() -> None:
    values: dict[str, Value] = {"ledger_closes": False}
    state = state_after(Event(kind="status", values=GAUGES | values))
    assert "✗ does not balance" in inner_text(shown(state, 60, 15))


def test_large_terminal_is_filled() -> None:
    state = busy_state()
    lines = shown(state, 200, 60)
    assert len(lines) > 50
    [reward] = [line for line in lines if line.startswith("│ reward   ")]
    assert len(re.findall("[▁▂▃▄▅▆▇█ ]{100,}", reward)) == 1
    text = inner_text(lines)
    assert "actor-1 v11" in text and "and 33 more" in text
    assert "So it is 71" in text
    newest = list(itertools.islice(reversed(state.recent_events), 8))
    assert [event for event in newest if " ".join(event.split()) not in text] == []


def test_wide_characters_do_not_break_the_frame() -> None:
    values: dict[str, Value] = SAMPLE | {
        "prompt": "请问她五月卖了多少个夹子" * 30,
        "extracted": "答",
    }
    state = state_after(
        Event(kind="status", values=GAUGES | {"warning": "路径不存在" * 30}),
        Event(kind="sample", values=values),
    )
    for view in ("figures", "samples"):
        assert {cell_len(line) for line in shown(state, 80, 24, view=view)} == {80}


# --- samples, help, the end ---------------------------------------------------------------------


def test_sample_view_shows_the_end_and_the_extracted_answer() -> None:
    state = state_after(Event(kind="sample", values=SAMPLE))
    for width, height in SIZES:
        text = inner_text(shown(state, width, height, view="samples"))
        assert text.startswith("speed_async")
        assert "reward 0.00 TRUNCATED screened out v11 prompt 17" in text
        assert "So it is 71" in text
        assert "extracted 71" in text


def test_latest_three_samples_are_shown_newest_first() -> None:
    samples = [
        Event(kind="sample", values=SAMPLE | {"prompt": f"prompt-{n}", "completion": ""})
        for n in range(5)
    ]
    text = inner_text(shown(state_after(*samples), 80, 24, view="samples"))
    assert re.findall(r"prompt-\d", text) == ["prompt-4", "prompt-3", "prompt-2"]
    assert "(empty)" in text


def test_sample_view_without_samples_has_a_note() -> None:
    assert "no sample yet" in inner_text(shown(full_state(), 60, 15, view="samples"))


def test_missing_answer_differs_from_an_empty_answer() -> None:
    state = state_after(Event(kind="sample", values=SAMPLE | {"extracted": None}))
    assert "extracted - (no answer found)" in inner_text(shown(state, 80, 24, view="samples"))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_help_explains_every_row_and_key(width: int, height: int) -> None:
    pages = [inner_text(shown(full_state(), width, height, view="help", page=n)) for n in range(9)]
    text = " ".join(pages)
    labels = {line[2:12].strip() for line in shown(full_state(), 80, 24)[1:-1]}
    rows = {label for label in labels if label and label[0] not in "█"}
    rows -= {"learning ─", "throughput", "flow ─────", "learner ti"}
    assert [row for row in rows if f"{row} " not in text] == []
    for key in ("h or ?", "Ctrl-C"):
        assert key in text
    assert "The limit varies" in text


@pytest.mark.parametrize(
    ("outcome", "label", "style"),
    [
        ("completed", "finished", "32"),
        ("stopped", "stopped", "34"),
        ("nothing_learned", "nothing learned", "35"),
        ("failed", "failed", "31"),
    ],
)
def test_each_outcome_has_its_label_and_colour(outcome: str, label: str, style: str) -> None:
    end: dict[str, Value] = {
        "wall_s": 70.0,
        "outcome": outcome,
        "ok": outcome == "completed",
        "reason": "as it is; resume: speed-async train --resume runs/demo",
    }
    state = state_after(Event(kind="status", values=GAUGES), Event(kind="end", values=end))
    assert f"{label}: as it is; resume: speed-async train --resume runs/demo" in inner_text(
        shown(state, 60, 15)
    )
    coloured = shown(state, 80, 24, force_terminal=True, color_system="standard", no_color=False)
    [phase] = [line for line in coloured if "12/100" in line]
    assert f"\x1b[1;{style}m{label}" in phase


def test_end_without_an_outcome_uses_ok() -> None:
    for ok, outcome in ((True, "completed"), (False, "failed"), (None, "failed")):
        state = state_after(Event(kind="end", values={"ok": ok, "reason": "x"}))
        assert state.outcome == outcome


def test_resumed_run_clears_the_outcome() -> None:
    end: dict[str, Value] = {"wall_s": 70.0, "outcome": "stopped", "ok": False, "reason": "signal"}
    status: dict[str, Value] = GAUGES | {"wall_s": 71.0}
    state = state_after(Event(kind="end", values=end), Event(kind="status", values=status))
    assert state.outcome is None


# --- stages, events -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stage"),
    [
        (
            {"phase": "starting", "learner_here": False, "actors_alive": 0, "actors_total": 2},
            "learner loads the model, 0/2 actors alive, 7s",
        ),
        (
            {"phase": "starting", "learner_here": True, "actors_alive": 0, "actors_total": 2},
            "0/2 actors alive, 7s",
        ),
        (
            {"phase": "evaluating", "evaluated_prompts": 120, "evaluation_prompts": 512},
            "first evaluation, 120 of 512 prompts, 7s",
        ),
        ({"phase": "evaluating", "accuracy_before": 0.2}, "last evaluation, 7s"),
        ({"phase": "draining"}, "actors finish running work, 7s"),
    ],
)
def test_stage_row_shows_activity_and_duration(values: dict[str, Value], stage: str) -> None:
    state = state_after(
        Event(kind="status", values={"wall_s": 3.0, **values}),
        Event(kind="status", values={"wall_s": 10.0, **values}),
    )
    assert f"stage {stage}" in inner_text(shown(state, 60, 15))


def test_panel_counts_seconds_before_the_first_event() -> None:
    text = inner_text(shown(PanelState("demo"), 60, 15, silent_s=3.4))
    assert "waiting for the run's first event, 3 s" in text


def test_silent_feed_is_shown() -> None:
    assert "no event from the run for 12 s" in inner_text(
        shown(full_state(), 60, 15, silent_s=12.0)
    )
    assert "no event" not in inner_text(shown(full_state(), 60, 15, silent_s=1.0))


def test_resolved_warning_stays_in_recent_events() -> None:
    state = state_after(
        Event(kind="status", values=GAUGES | {"warning": WARNING, "actors_alive": 1}),
        Event(kind="status", values=GAUGES | {"wall_s": 65.0, "warning": "", "actors_alive": 2}),
    )
    assert state.warnings == []
    assert list(state.recent_events)[-3:] == [
        "1m02s  actors 1",
        f"1m02s  ! {WARNING}",
        "1m05s  actors 2",
    ]


def test_diagnosis_with_changing_numbers_is_one_event() -> None:
    texts = ("All rewards are 0 for 40 s.", "All rewards are 0 for 41 s.", "")
    state = state_after(
        *(Event(kind="status", values=GAUGES | {"diagnoses": text}) for text in texts)
    )
    assert [text for text in state.recent_events if "✗" in text] == [
        "1m02s  ✗ All rewards are 0 for 40 s."
    ]
    assert state.diagnoses == []
