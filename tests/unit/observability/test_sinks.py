import json
import resource
import signal
from pathlib import Path

import pytest

from speed_async.errors import DataError
from speed_async.observability.metrics import Event, EventKind
from speed_async.observability.sample_file import SampleFile
from speed_async.observability.sinks import JsonlSink, read_events

STEP = Event(kind="step", values={"wall_s": 1.5, "policy_version": 1, "phase": "training"})
EVALUATION = Event(kind="evaluation", values={"wall_s": 2.0, "accuracy": 0.25, "note": None})
END = Event(kind="end", values={"ok": True, "reason": "done"})


def test_events_are_read_back_unchanged(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for event in (STEP, EVALUATION, END):
        sink.write(event)
    sink.close()
    sink.close()
    assert read_events(tmp_path / "metrics.jsonl") == [STEP, EVALUATION, END]


def test_lines_are_json_objects_and_readable_before_close(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "new" / "folder")
    sink.write(EVALUATION)
    text = sink.path.read_text()
    sink.close()
    assert text.endswith("\n")
    assert json.loads(text) == {"kind": "evaluation", "wall_s": 2.0, "accuracy": 0.25, "note": None}


def test_status_events_are_not_stored(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Event(kind="status", values={"wall_s": 1.0}))
    sink.close()
    assert sink.path.read_text() == ""


def sample(number: int) -> Event:
    text = f"completion {number}\n\u2028 ü"
    return Event(kind="sample", values={"prompt_id": number, "extracted": None, "completion": text})


def samples(folder: Path) -> list[dict[str, object]]:
    """Lines of samples.jsonl, split only at line feeds."""
    text = (folder / "samples.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_samples_are_appended_to_their_own_file_after_a_resume(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    assert not (tmp_path / "samples.jsonl").exists()
    for number in range(2):
        sink.write(sample(number))
    sink.close()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"kind": "sample", "prom')  # a process killed while writing a line
    resumed = JsonlSink(tmp_path)
    resumed.write(sample(2))
    resumed.close()
    assert samples(tmp_path) == [{"kind": "sample"} | sample(n).values for n in range(3)]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_sample_file_is_bounded_and_marked_full_once(tmp_path: Path) -> None:
    for _ in range(2):  # the second iteration is a resumed run
        file = SampleFile(tmp_path, max_file_bytes=1000)
        for number in range(30):
            file.write(sample(number).values)
    *kept, last = samples(tmp_path)
    assert last == {"kind": "full", "max_bytes": 1000}
    assert [line["prompt_id"] for line in kept] == list(range(len(kept))) and len(kept) > 5
    assert (tmp_path / "samples.jsonl").stat().st_size < 1100


def test_full_disk_drops_samples_without_partial_lines(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(sample(0))
    before = (tmp_path / "samples.jsonl").read_bytes()
    # The kernel truncates writes at this size, as on a full disk.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        for number in (1, 2):
            with pytest.raises(OSError):
                sink.write(sample(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    sink.write(sample(3))
    sink.close()
    assert [line["prompt_id"] for line in samples(tmp_path)] == [0, 3]


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Event(kind="step", values={"loss": float("nan"), "grad_norm": float("inf")}))
    sink.close()
    assert sink.path.read_text() == '{"kind": "step", "loss": null, "grad_norm": null}\n'


def test_second_sink_truncates_a_partial_line_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "end", "ok": true, "reason": "done"}\n{"kind": "st')
    assert read_events(path) == [END]
    sink = JsonlSink(tmp_path)
    sink.write(STEP)
    sink.close()
    assert read_events(path) == [END, STEP]


@pytest.mark.parametrize("line", ["{nonsense", '{"kind": "other"}', '{"kind": []}', "[1]", ""])
def test_malformed_line_error_has_the_line_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "end"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_events(path)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_events(tmp_path / "metrics.jsonl")


def test_events_after_the_last_stored_one_are_lost_also_in_the_same_millisecond(
    tmp_path: Path,
) -> None:
    def event(kind: EventKind, wall_s: float, version: int) -> Event:
        return Event(kind=kind, values={"wall_s": wall_s, "policy_version": version})

    emitted = [
        event("step", 1.0, 1),
        event("evaluation", 1.0, 1),
        event("step", 2.0, 2),
        event("end", 2.0, 2),
    ]
    assert JsonlSink(tmp_path / "new").lost(emitted) == emitted
    for count in range(1, 5):
        folder = tmp_path / str(count)
        first = JsonlSink(folder)
        for one in emitted[:count]:
            first.write(one)
        first.close()
        assert JsonlSink(folder).lost(emitted) == emitted[count:]
    (tmp_path / "4" / "metrics.jsonl").write_text("[]\n")
    assert JsonlSink(tmp_path / "4").lost(emitted) == []
