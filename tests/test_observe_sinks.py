import json
from pathlib import Path

import pytest

from speed_async.errors import DataError
from speed_async.observe.metrics import Event
from speed_async.observe.sinks import JsonlSink, RecordingSink, Sink, read_events

STEP = Event(kind="step", values={"wall_s": 1.5, "policy_version": 1, "phase": "training"})
EVALUATION = Event(kind="evaluation", values={"wall_s": 2.0, "accuracy": 0.25, "note": None})
END = Event(kind="end", values={"ok": True, "reason": "done"})


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for event in (STEP, EVALUATION, END):
        sink.write(event)
    sink.close()
    sink.close()
    assert read_events(tmp_path / "metrics.jsonl") == [STEP, EVALUATION, END]


def test_each_line_is_one_object_with_its_kind_and_is_readable_before_close(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "new" / "folder")
    sink.write(EVALUATION)
    text = sink.path.read_text()
    sink.close()
    assert text.endswith("\n")
    assert json.loads(text) == {"kind": "evaluation", "wall_s": 2.0, "accuracy": 0.25, "note": None}


def test_gauges_of_a_moment_are_not_kept(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Event(kind="status", values={"wall_s": 1.0}))
    sink.close()
    assert sink.path.read_text() == ""


def test_numbers_json_cannot_carry_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Event(kind="step", values={"loss": float("nan"), "grad_norm": float("inf")}))
    sink.close()
    assert sink.path.read_text() == '{"kind": "step", "loss": null, "grad_norm": null}\n'


def test_a_second_sink_appends_after_dropping_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "end", "ok": true, "reason": "done"}\n{"kind": "st')
    assert read_events(path) == [END]
    sink = JsonlSink(tmp_path)
    sink.write(STEP)
    sink.close()
    assert read_events(path) == [END, STEP]


@pytest.mark.parametrize("line", ["{nonsense", '{"kind": "other"}', '{"kind": []}', "[1]", ""])
def test_a_malformed_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "end"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_events(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_events(tmp_path / "metrics.jsonl")


def test_the_recording_sink_remembers_everything() -> None:
    sink = RecordingSink()
    as_sink: Sink = sink
    as_sink.write(STEP)
    as_sink.write(END)
    as_sink.close()
    assert (sink.events, sink.num_closes) == ([STEP, END], 1)
