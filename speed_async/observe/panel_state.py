"""What the panel knows, grown from events alone. No terminal, no clock: time is `wall_s`."""

from dataclasses import dataclass, field

from speed_async.observe.glyphs import Point
from speed_async.observe.metrics import Event, Value
from speed_async.observe.notation import decimal, duration, finite, single_line

RECENT_S = 120.0
HISTORY_LIMIT = 512
GAUGE_KINDS = ("status", "step", "end")


@dataclass(slots=True)
class History:
    """A whole run in at most `HISTORY_LIMIT` points: when full, neighbours are averaged."""

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
    """The last `RECENT_S` seconds, and the peak since the start."""

    points: list[Point] = field(default_factory=list)
    peak: float | None = None

    def add(self, at_s: float, value: Value) -> None:
        number = finite(value)
        if number is None:
            return
        self.peak = number if self.peak is None else max(self.peak, number)
        self.points = [point for point in self.points if point[0] > at_s - RECENT_S]
        self.points.append((at_s, number))


@dataclass(slots=True)
class PanelState:
    """Latest value of every key, and the histories behind the sparklines."""

    title: str
    values: dict[str, Value] = field(default_factory=dict)
    reward: History = field(default_factory=History)
    accuracy: History = field(default_factory=History)
    generated: Recent = field(default_factory=Recent)
    trained: Recent = field(default_factory=Recent)
    last_event: str | None = None
    ended_ok: bool | None = None
    """None while the run goes on."""

    def update(self, event: Event) -> None:
        wall_s = finite(event.values.get("wall_s"))
        at_s = self.wall_s if wall_s is None else wall_s
        if event.kind in GAUGE_KINDS:
            self.values.update(event.values)
            self.generated.add(at_s, event.values.get("generated_tokens_per_s"))
            self.trained.add(at_s, event.values.get("trained_tokens_per_s"))
        if event.kind == "step":
            self.reward.add(at_s, event.values.get("reward_mean"))
        elif event.kind == "evaluation":
            self._evaluated(at_s, event.values)
        elif event.kind == "end":
            self._ended(at_s, event.values)
        if wall_s is not None:
            self.values["wall_s"] = wall_s

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, as of the last event."""
        return finite(self.values.get("wall_s")) or 0.0

    def _evaluated(self, at_s: float, values: dict[str, Value]) -> None:
        accuracy = values.get("accuracy")
        self.accuracy.add(at_s, accuracy)
        self.values["accuracy"] = accuracy
        self.last_event = (
            f"{duration(at_s)}  held-out {decimal(accuracy, 3)}"
            f" at v{decimal(values.get('policy_version'), 0)},"
            f" {decimal(values.get('num_passed'), 0)}"
            f"/{decimal(values.get('num_completions'), 0)} passed"
        )

    def _ended(self, at_s: float, values: dict[str, Value]) -> None:
        self.ended_ok = values.get("ok") is True
        self.values["eta_s"] = None
        word = "finished" if self.ended_ok else "failed"
        self.last_event = f"{duration(at_s)}  {word}: {single_line(values.get('reason'))}"
