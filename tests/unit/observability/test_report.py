from pathlib import Path

import pytest
from matplotlib.image import imread

from speed_async.errors import DataError
from speed_async.observability.metrics import Event
from speed_async.observability.report import plot_accuracy, summary_text
from speed_async.observability.sinks import JsonlSink


def run_with(folder: Path, num_evaluations: int, num_steps: int) -> Path:
    sink = JsonlSink(folder)
    for index in range(num_steps):
        values = {"wall_s": index + 1.0, "reward_mean": 0.3 + 0.01 * index}
        sink.write(Event(kind="step", values=dict(values)))
    for index in range(num_evaluations):
        values = {"wall_s": 5.0 * index, "accuracy": 0.2 + 0.1 * index}
        sink.write(Event(kind="evaluation", values=dict(values)))
    sink.close()
    return folder


def num_pixels_like(path: Path, red: float, green: float, blue: float) -> int:
    pixels = imread(path)  # (height, width, 4)
    distance = abs(pixels[:, :, :3] - [red, green, blue]).max(axis=2)
    return int((distance < 0.05).sum())


BLUE = (0x0B / 255, 0x5F / 255, 0xA5 / 255)


def test_figure_shows_both_lines(tmp_path: Path) -> None:
    path = plot_accuracy(run_with(tmp_path, num_evaluations=5, num_steps=20))
    assert path == tmp_path / "accuracy.png"
    assert imread(path).shape == (675, 1200, 4)
    assert num_pixels_like(path, *BLUE) > 3000
    faint_orange = [0.45 + 0.55 * c / 255 for c in (0xD9, 0x8A, 0x29)]
    assert num_pixels_like(path, *faint_orange) > 500


def test_figure_draws_all_evaluations(tmp_path: Path) -> None:
    none = plot_accuracy(run_with(tmp_path / "none", num_evaluations=0, num_steps=0))
    single = plot_accuracy(run_with(tmp_path / "single", num_evaluations=1, num_steps=0))
    several = plot_accuracy(run_with(tmp_path / "several", num_evaluations=3, num_steps=0))
    blues = [num_pixels_like(path, *BLUE) for path in (none, single, several)]
    assert blues[0] == 0
    assert 0 < blues[1] < blues[2]


def test_missing_metrics_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        plot_accuracy(tmp_path)


SUMMARY: dict[str, object] = {
    "reason": "100 updates done",
    "accuracy_before": 0.283,
    "accuracy_before_version": 0,
    "accuracy_after": 0.512,
    "accuracy_last": 0.512,
    "accuracy_last_version": 100,
    "wall_s": 244.2,
    "policy_version": 100,
    "optimizer_updates": 100,
    "completions_trained": 38400,
    "tokens_generated": 512345,
    "tokens_per_s": 2098.1,
    "gate_acceptance": 0.38,
    "staleness_mean": 0.8,
    "staleness_max": 2,
    "ledger": {
        "groups": {"generated": 12, "trained": 8, "screened_out": 4, "evaluation": 5},
        "tokens": {"generated": 1000, "trained": 700, "screened_out": 200, "evaluation": 100},
        "closes": True,
        "checks": {"groups add up": True, "tokens add up": True},
    },
    "run_folder": "runs/arithmetic",
}


def test_complete_summary() -> None:
    assert (
        summary_text(SUMMARY)
        == """\
run ended: 100 updates done

  accuracy    28.3 % -> 51.2 %  (+22.9 points)
  wall time   4m04s
  trained     100 updates of 38,400 completions
  generated   512,345 tokens, 2,098 tokens/s
  gate        38 % of screened prompts continued
  staleness   mean 0.80, max 2 versions

  ledger                groups          tokens     share
    trained                  8             700      70 %
    screened out             4             200      20 %
    evaluation               5             100      10 %
    generated               12           1,000
  balanced    yes (2 checks passed)

  files       runs/arithmetic
"""
    )


def test_optimizer_updates_are_shown_beside_the_updates_where_a_batch_has_several() -> None:
    text = summary_text(SUMMARY | {"optimizer_updates": 200})
    assert "  trained     100 updates of 38,400 completions, 200 optimizer updates\n" in text


def test_stopped_run_shows_the_last_accuracy_and_the_resume_command() -> None:
    stopped = SUMMARY | {
        "accuracy_after": None,
        "accuracy_last_version": 80,
        "completed": False,
        "run_folder": "my runs/a",
    }
    text = summary_text(stopped)
    assert (
        "  accuracy    28.3 % -> 51.2 %  (+22.9 points) at version 80, the last one measured\n"
    ) in text
    assert text.endswith("  resume      speed-async train --resume 'my runs/a'\n")
    assert "resume" not in summary_text(SUMMARY | {"completed": True})


def test_single_accuracy_shows_no_change() -> None:
    text = summary_text(SUMMARY | {"accuracy_after": None, "accuracy_last_version": 0})
    assert "  accuracy    28.3 % at version 0, the only one measured\n" in text
    assert "points" not in text


def test_diagnoses_and_failure_examples_fit_80_columns() -> None:
    ledger = {
        "groups": {"failed": 3},
        "failures": {"prompt": 2, "actor lost": 1},
        "held_out_failures": {"prompt": 4},
        "failure_examples": {
            "prompt": "prompt: " + "it is too long " * 9,
            "actor lost": "actor lost",
        },
    }
    diagnoses = [
        {"text": "no reward: none passed. Change: x", "active_at_end": True},
        {"text": "the gate starves", "active_at_end": False, "last_s": 62.0, "last_version": 9},
    ]
    text = summary_text({"ledger": ledger, "diagnoses": diagnoses})
    assert "  failures    prompt (2), actor lost (1)\n              first: prompt: it is" in text
    assert "  held-out    failed: prompt (4)\n" in text
    assert "first: actor lost" not in text
    assert "  diagnosis   no reward: none passed. Change: x\n" in text
    assert "  diagnosis   the gate starves (resolved at 1m02s, version 9)\n" in text
    assert max(map(len, text.splitlines())) <= 80


def test_completions_without_a_verdict_are_in_the_summary_only_if_there_are_any() -> None:
    counts = {"scored": 1200, "timeout": 3, "error": 0}
    verifier = {name: {"completions": number} for name, number in counts.items()}
    assert "  verifier    3 timeouts of 1,203 completions\n" in summary_text({"verifier": verifier})
    verifier["timeout"] = {"completions": 0}
    assert "verifier" not in summary_text({"verifier": verifier})


def test_unbalanced_ledger_names_violated_checks_and_failures() -> None:
    ledger = {
        "groups": {"failed": 3},
        "tokens": {"failed": 40},
        "failures": {"actor lost": 3},
        "closes": False,
        "checks": {"groups add up": True, "tokens add up": False},
    }
    text = summary_text({"ledger": ledger})
    assert "  failures    actor lost (3)\n" in text
    assert "  balanced    NO\n    violated: tokens add up\n" in text
    assert "groups add up" not in text


def test_empty_summary_has_dashes() -> None:
    text = summary_text({})
    assert "  accuracy    -\n" in text
    assert "  ledger      -\n" in text


def test_breakdown_is_optional() -> None:
    summary = {
        "breakdown": {
            "learner": {"waiting for groups": 3.0, "training": 1.0},
            "actors": {"sampling": 0.0},
        }
    }
    assert "waiting for groups" not in summary_text(summary)
    lines = summary_text(summary, breakdown=True).splitlines()
    assert "      waiting for groups               3.0      75 %" in lines
    assert "      training                         1.0      25 %" in lines
    assert any(line.startswith("      sampling") and line.endswith(" -") for line in lines)


def test_notices_fit_80_columns() -> None:
    notice = "checkpoint version-000006 is damaged (model.safetensors is not as it was written)"
    text = summary_text({"notices": [notice]})
    [first, second] = [line for line in text.splitlines() if "damaged" in line or "written" in line]
    assert first.startswith("  note        checkpoint version-000006 is damaged")
    assert second == "              it was written)"
    assert len(first) <= 80
    assert "note" not in summary_text({"notices": []})


def test_summary_reports_repeated_updates() -> None:
    text = summary_text({"updates_repeated": 7, "updates_repeated_alike": 7})
    assert "  repeated    7 updates from the journal, 7 bitwise identical" in text
    assert "repeated" not in summary_text({"updates_repeated": 0})
