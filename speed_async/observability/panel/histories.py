"""Data of the sparklines: the whole run in few points, or the last minutes."""

from dataclasses import dataclass, field

from speed_async.observability.metrics import Value
from speed_async.observability.notation import finite
from speed_async.observability.panel.glyphs import Point

RECENT_S = 120.0
SHORT_S = 10.0
HISTORY_LIMIT = 512


@dataclass(slots=True)
class History:
    """A whole run in at most `HISTORY_LIMIT` points: pairs are averaged when it is full."""

    points: list[Point] = field(default_factory=list)
    first: float | None = None
    last: float | None = None
    best: float | None = None

    def add(self, at_s: float, value: Value) -> None:
        number = finite(value)
        if number is None:
            return
        self.first = number if self.first is None else self.first
        self.best = number if self.best is None else max(self.best, number)
        self.last = number
        self.points.append((at_s, number))
        if len(self.points) >= HISTORY_LIMIT:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((s + t) / 2, (x + y) / 2) for (s, x), (t, y) in pairs]


@dataclass(slots=True)
class Recent:
    """The last `window_s` seconds, and the peak since the start."""

    window_s: float = RECENT_S
    points: list[Point] = field(default_factory=list)
    peak: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the window; None without points."""
        return sum(y for _, y in self.points) / len(self.points) if self.points else None

    def add(self, at_s: float, value: Value) -> None:
        number = finite(value)
        if number is None:
            return
        self.peak = number if self.peak is None else max(self.peak, number)
        self.points = [point for point in self.points if point[0] > at_s - self.window_s]
        self.points.append((at_s, number))
