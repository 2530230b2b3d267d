"""Where kept events go. `status` events are gauges of a moment: only the live feed carries them."""

import json
import math
from pathlib import Path
from typing import Protocol, cast, get_args

from speed_async.errors import DataError
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.observability.sample_file import SampleFile

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes every event of a run, in order."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None:
        """Flush and release everything. May be called twice."""
        ...


class JsonlSink:
    """Appends one JSON object a line to `metrics.jsonl`: `kind` first, then the event's values;
    samples go to `samples.jsonl` (sample_file.py).

    A line is whole on disk's side of the process as soon as `write` returns, so a reader may
    follow the file and a killed process loses nothing it reported. A number that JSON cannot
    carry (nan, inf) is written as null.
    """

    def __init__(self, run_folder: Path) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self.path = run_folder / METRICS_FILE
        _drop_torn_tail(self.path)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._samples = SampleFile(run_folder)

    def write(self, event: Event) -> None:
        if event.kind == "status":
            return
        if event.kind == "sample":
            self._samples.write({key: _finite(item) for key, item in event.values.items()})
            return
        line = {"kind": event.kind} | {key: _finite(item) for key, item in event.values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class RecordingSink:
    """The shipped fake: remembers what it was given."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.num_closes = 0

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.num_closes += 1


def read_events(path: Path) -> list[Event]:
    """Events of a `metrics.jsonl`; a last line still being written is left out.

    Raises DataError naming file and line when the file is missing or a whole line is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; has this run written metrics yet?") from None
    whole_lines = text.split("\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(whole_lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Event:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in get_args(EventKind):
        raise DataError(f"{path}:{number}: no event: 'kind' is {kind!r}")
    return Event(kind=cast(EventKind, kind), values=values)


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_tail(path: Path) -> None:
    """A killed process may have left half a line; appending to it would spoil a second one."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole_bytes = content.rfind(b"\n") + 1
    if whole_bytes < len(content):
        with path.open("r+b") as file:
            file.truncate(whole_bytes)
