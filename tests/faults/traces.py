"""Reads the traces of groups written by actors and the learner (transport/tracing.py)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(kw_only=True)
class ActorTrace:
    """One incarnation of one actor."""

    name: str
    sent: list[Line] = field(default_factory=list)
    counted: list[tuple[int, int]] = field(default_factory=list)
    """(message number, tokens generated), in order."""
    acknowledged: int = 0
    """The service has acknowledged every message up to this number."""
    acknowledged_when_refused: int | None = None

    @property
    def accepted(self) -> int:
        """The service has accepted every message up to this number."""
        if self.acknowledged_when_refused is None:
            return self.acknowledged
        return self.acknowledged_when_refused

    def is_accepted(self, line: Line) -> bool:
        return line["number"] <= self.accepted


@dataclass(kw_only=True)
class Update:
    """One update by one incarnation of the learner; `policy_version` is the version after it."""

    policy_version: int
    groups: list[str]
    tokens: int
    skipped: bool
    time_s: float
    is_acknowledged: bool = False
    """The service has acknowledged it."""


@dataclass(kw_only=True)
class Traces:
    actors: list[ActorTrace] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    """By time, including those that were rolled back."""
    batches: list[Line] = field(default_factory=list)
    """`taken` lines by time."""

    def lineage(self) -> dict[int, Update]:
        """The surviving updates: training a version again rolls back all later ones."""
        surviving: dict[int, Update] = {}
        for update in self.updates:
            for version in [v for v in surviving if v >= update.policy_version]:
                del surviving[version]
            surviving[update.policy_version] = update
        return surviving


def read_traces(folder: Path) -> Traces:
    """All complete lines in `folder` so far."""
    traces = Traces()
    # The learner first: everything it has trained is already in the actors' files then.
    for path in sorted(folder.glob("learner*.jsonl")):
        _read_learner(path, traces)
    for path in sorted(folder.glob("actor*.jsonl")):
        traces.actors.append(_read_actor(path))
    traces.updates.sort(key=lambda update: update.time_s)
    traces.batches.sort(key=lambda line: line["time_s"])
    return traces


def _read_actor(path: Path) -> ActorTrace:
    trace = ActorTrace(name=path.stem)
    for line in _lines(path):
        match line["kind"]:
            case "sent":
                trace.sent.append(line)
                trace.counted.append((line["number"], line["generated"]))
            case "counted":
                trace.counted.append((line["number"], line["generated"]))
            case "acked":
                trace.acknowledged = line["number"]
            case "refused" if trace.acknowledged_when_refused is None:
                trace.acknowledged_when_refused = trace.acknowledged
    return trace


def _read_learner(path: Path, traces: Traces) -> None:
    unacknowledged: list[tuple[int, Update]] = []
    for line in _lines(path):
        match line["kind"]:
            case "taken":
                traces.batches.append(line)
            case "trained":
                fields = ("policy_version", "groups", "tokens", "skipped", "time_s")
                update = Update(**{name: line[name] for name in fields})
                unacknowledged.append((line["number"], update))
                traces.updates.append(update)
            case "acked":
                while unacknowledged and unacknowledged[0][0] <= line["number"]:
                    unacknowledged.pop(0)[1].is_acknowledged = True


def _lines(path: Path) -> Iterator[Line]:
    for text in path.read_text().split("\n")[:-1]:
        yield json.loads(text)
