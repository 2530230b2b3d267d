"""Sinks of stored events. `status` events are momentary gauges, sent only to the live feed."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast, get_args

from speed_async.errors import DataError
from speed_async.observability.metrics import Event, EventKind, Value
from speed_async.observability.sample_file import SampleFile, drop_partial_line, last_line

METRICS_FILE = "metrics.jsonl"
Key = tuple[float, str, Value]
"""`wall_s`, kind and policy version of an event."""


class Sink(Protocol):
    """Receives all events of a run, in order."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None:
        """Flush and release all resources. May be called twice."""
        ...


class JsonlSink:
    """Appends one JSON object per line to `metrics.jsonl`: `kind` first, then the event's values.

    Samples are written to `samples.jsonl` (sample_file.py).

    `write` passes the complete line to the operating system, so readers can follow the file and a
    killed process loses no reported events. Numbers that JSON cannot represent (nan, inf) are
    written as null.
    """

    def __init__(self, run_folder: Path) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self.path = run_folder / METRICS_FILE
        with self.path.open("a+b") as file:
            size = drop_partial_line(file.fileno())
            self._last = _key(last_line(file.fileno(), size)) if size else None
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

    def lost(self, replayed: Sequence[Event]) -> list[Event]:
        """Those of the events that an earlier process emitted, in order, and did not store."""
        if self._last is None:
            return [*replayed]
        end_s = self._last[0]
        keys = [_key_of(event.kind, event.values) for event in replayed]
        if self._last in keys:
            return [*replayed[keys.index(self._last) + 1 :]]
        return [event for event, key in zip(replayed, keys, strict=True) if key[0] > end_s]

    def close(self) -> None:
        self._file.close()


def _key(line: bytes) -> Key:
    """The key of a stored event. After a line that is not one, nothing is known to be lost."""
    try:
        values = json.loads(line)
        return _key_of(values.pop("kind"), values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return math.inf, "", None


def _key_of(kind: str, values: Mapping[str, Value]) -> Key:
    return float(cast(float, values["wall_s"])), kind, values.get("policy_version")


def read_events(path: Path) -> list[Event]:
    """Read the events of a `metrics.jsonl`, skipping a partial last line.

    Raises DataError with file and line if the file is missing or a complete line is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; no metrics were written yet") from None
    complete_lines = text.split("\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(complete_lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Event:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in get_args(EventKind):
        raise DataError(f"{path}:{number}: not an event: 'kind' is {kind!r}")
    return Event(kind=cast(EventKind, kind), values=values)


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
