"""The record of a run, and the file of all records: one JSON line per run, appended only."""

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.evidence.plan import Endpoint, Setting

IDLE_CORES = 0.1
"""A run counts as made on an idle machine if other processes used less than this many cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run to make."""

    experiment: str
    spread: str
    arm: str
    setting: Setting
    seed: int

    @property
    def key(self) -> tuple[object, ...]:
        return (self.experiment, self.spread, self.arm, self.setting, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A scored version: what had been spent when it was made, and its exact accuracy."""

    version: int
    tokens: float
    wall_s: float
    core_s: float
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Record(Job):
    """A finished job."""

    points: tuple[Point, ...]
    """The first one is version 0, which cost nothing."""
    ended: str
    """`horizon`, or why the run ended before it."""
    commit: str
    """Ends with `+` if files of the repository were modified."""
    started: str
    """UTC."""
    prompts: str
    """Digest of all prompts."""
    overrides: tuple[str, ...]
    role_core_s: dict[str, float]
    process_s: float
    foreign_cores: float
    totals: dict[str, Any] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return self.foreign_cores < IDLE_CORES

    def cost(self, endpoint: Endpoint, target: float, horizon_tokens: float) -> float:
        """What it took to first reach the accuracy `target`, on the line between two scored
        versions. Infinite if that took more than `horizon_tokens`."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if before.accuracy < target <= after.accuracy:
                part = (target - before.accuracy) / (after.accuracy - before.accuracy)
                if _between(before.tokens, after.tokens, part) > horizon_tokens:
                    return math.inf
                return _between(getattr(before, endpoint), getattr(after, endpoint), part)
        return math.inf

    def to_json(self) -> dict[str, Any]:
        columns = {
            name: [getattr(point, name) for point in self.points] for name in Point.__slots__
        }
        return asdict(self) | {"points": columns}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        columns = value["points"]
        rows = zip(*(columns[name] for name in Point.__slots__), strict=True)
        points = tuple(Point(**dict(zip(Point.__slots__, row, strict=True))) for row in rows)
        setting = Setting(**value["setting"])
        overrides = tuple(value["overrides"])
        return cls(**value | {"points": points, "setting": setting, "overrides": overrides})


def _between(before: float, after: float, part: float) -> float:
    return before + part * (after - before)


def read_records(path: Path, experiment: str) -> list[Record]:
    """The records of one experiment, in the order in which they were appended."""
    if not path.exists():
        return []
    values = (json.loads(line) for line in path.read_text().splitlines())
    return [Record.from_json(value) for value in values if value["experiment"] == experiment]


def append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record.to_json(), separators=(",", ":")) + "\n")


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds the file for one session. Raises RuntimeError if another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another session appends to '{path}': end it first") from None
        yield
