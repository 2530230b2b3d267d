"""Reads the traces of groups that actors and learner wrote (transport/tracing.py)."""

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
    """(number of the message, tokens generated), in their order."""
    heard: int = 0
    """The service has said that it has every message up to this number."""
    heard_when_refused: int | None = None

    @property
    def accepted(self) -> int:
        """Messages up to this number were taken by the service."""
        return self.heard if self.heard_when_refused is None else self.heard_when_refused

    def is_accepted(self, line: Line) -> bool:
        return line["number"] <= self.accepted


@dataclass(kw_only=True)
class Update:
    """One update by one life of the learner; `policy_version` is the one after it."""

    policy_version: int
    groups: list[str]
    tokens: int
    skipped: bool
    time_s: float
    is_heard: bool = False
    """The service has said that it knows of it."""


@dataclass(kw_only=True)
class Traces:
    actors: list[ActorTrace] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    """In the order of time, those of lives that were rolled back too."""
    batches: list[Line] = field(default_factory=list)
    """`taken` lines, likewise."""

    def lineage(self) -> dict[int, Update]:
        """What survives: whoever trains a version again takes back all that came after it."""
        surviving: dict[int, Update] = {}
        for update in self.updates:
            for version in [v for v in surviving if v >= update.policy_version]:
                del surviving[version]
            surviving[update.policy_version] = update
        return surviving


def read_traces(folder: Path) -> Traces:
    """All lines in `folder` so far; a last line that is not whole is left out."""
    traces = Traces()
    # The learner's first: what it trained by then, its actors had written before.
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
            case "heard":
                trace.heard = line["number"]
            case "refused" if trace.heard_when_refused is None:
                trace.heard_when_refused = trace.heard
    return trace


def _read_learner(path: Path, traces: Traces) -> None:
    unheard: list[tuple[int, Update]] = []
    for line in _lines(path):
        match line["kind"]:
            case "taken":
                traces.batches.append(line)
            case "trained":
                fields = ("policy_version", "groups", "tokens", "skipped", "time_s")
                update = Update(**{name: line[name] for name in fields})
                unheard.append((line["number"], update))
                traces.updates.append(update)
            case "heard":
                while unheard and unheard[0][0] <= line["number"]:
                    unheard.pop(0)[1].is_heard = True


def _lines(path: Path) -> Iterator[Line]:
    for text in path.read_text().split("\n")[:-1]:
        yield json.loads(text)
