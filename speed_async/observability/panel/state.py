"""State of the panel, derived from events only. Time is `wall_s`: no terminal, no clock."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from speed_async.observability.metrics import Event, Value
from speed_async.observability.notation import (
    count,
    decimal,
    duration,
    finite,
    single_line,
    split_lines,
)
from speed_async.observability.outcomes import identity_of, outcome_of, outcome_sentence
from speed_async.observability.panel.histories import SHORT_S, History, Recent

NUM_RECENT_EVENTS = 64
NUM_SAMPLES = 3
ACTOR_LAG = "weights/lag/"
"""Prefix of the key of each connected actor."""
GAUGE_KINDS = ("status", "step", "end")


@dataclass(slots=True)
class SuiteResults:
    """Results of one suite."""

    history: History = field(default_factory=History)
    """mean@k."""
    last: dict[str, Value] = field(default_factory=dict)
    """Values of the last event."""


@dataclass(slots=True)
class PanelState:
    """Latest value of every key, histories of the sparklines, and recent events."""

    title: str
    values: dict[str, Value] = field(default_factory=dict)
    reward: History = field(default_factory=History)
    accuracy: History = field(default_factory=History)
    suites: dict[str, SuiteResults] = field(default_factory=dict)
    """Results of the suites other than the held-out prompts, in the order of their first one."""
    generated: Recent = field(default_factory=Recent)
    trained: Recent = field(default_factory=Recent)
    share_busy: Recent = field(default_factory=partial(Recent, window_s=SHORT_S))
    """Share of busy slots. An event has that of one instant, which varies much."""
    recent_events: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_EVENTS))
    """One line each, newest last."""
    samples: deque[dict[str, Value]] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    """Values of the latest sample events, newest last."""
    outcome: str | None = None
    """None while the run is active."""
    reason: str = ""
    """Reason of the outcome."""
    stage_since_s: float = 0.0
    """Start of the current phase."""
    had_actors: bool = False
    """Whether an actor was alive since the learner (re)connected; until then none is missing."""

    def update(self, event: Event) -> None:
        wall_s = finite(event.values.get("wall_s"))
        at_s = self.wall_s if wall_s is None else wall_s
        if event.kind == "sample":
            self.samples.append(event.values)
            return
        if event.kind in GAUGE_KINDS:
            if event.kind != "end":
                self.outcome, self.reason = None, ""  # the run was resumed
            self._record_changes(at_s, event.values)
            for key in [key for key in self.values if key.startswith(ACTOR_LAG)]:
                del self.values[key]  # the actor may be gone
            self.values.update(event.values)
            if event.values.get("learner_here") is False:
                self.had_actors = False
            elif finite(event.values.get("actors_alive")):
                self.had_actors = True
            self.generated.add(at_s, event.values.get("generated_tokens_per_s"))
            self.trained.add(at_s, event.values.get("trained_tokens_per_s"))
            if (slots := finite(event.values.get("actors_slots"))) is not None and slots > 0:
                busy = finite(event.values.get("actors_slots_busy"))
                self.share_busy.add(at_s, None if busy is None else busy / slots)
        if event.kind == "step":
            self.reward.add(at_s, event.values.get("reward_mean"))
        elif event.kind == "evaluation":
            self._handle_evaluation(at_s, event.values)
        elif event.kind == "suite":
            self._handle_suite(at_s, event.values)
        elif event.kind == "end":
            self._handle_end(at_s, event.values)
        if wall_s is not None:
            self.values["wall_s"] = wall_s

    @property
    def wall_s(self) -> float:
        """Seconds since the start of the run, as of the last event."""
        return finite(self.values.get("wall_s")) or 0.0

    @property
    def warnings(self) -> list[str]:
        return split_lines(self.values.get("warning"))

    @property
    def diagnoses(self) -> list[str]:
        return split_lines(self.values.get("diagnoses"))

    def _record_changes(self, at_s: float, values: Mapping[str, Value]) -> None:
        """Record events for changed values."""
        before = self.values
        if values.get("phase") != before.get("phase"):
            self.stage_since_s = at_s
        if values.get("learner_here") and not before.get("learner_here"):
            self._record(at_s, "the learner has loaded the model")
        alive, alive_before = values.get("actors_alive"), before.get("actors_alive")
        if alive is not None and alive != (alive_before or 0):
            self._record(at_s, f"actors {actors_alive_text(values)}")
        for warning in split_lines(values.get("warning")):
            if warning not in self.warnings:
                self._record(at_s, f"! {warning}")
        known = set(map(identity_of, self.diagnoses))
        for diagnosis in split_lines(values.get("diagnoses")):
            if identity_of(diagnosis) not in known:
                self._record(at_s, f"✗ {diagnosis}")

    def _record(self, at_s: float, text: str) -> None:
        self.recent_events.append(f"{duration(at_s)}  {text}")

    def _handle_evaluation(self, at_s: float, values: Mapping[str, Value]) -> None:
        accuracy = values.get("accuracy")
        self.accuracy.add(at_s, accuracy)
        self.values["accuracy"] = accuracy
        self._record(
            at_s,
            f"held-out {decimal(accuracy, 3)} at v{decimal(values.get('policy_version'), 0)},"
            f" {decimal(values.get('num_passed'), 0)}"
            f"/{decimal(values.get('num_completions'), 0)} passed",
        )

    def _handle_suite(self, at_s: float, values: Mapping[str, Value]) -> None:
        name = single_line(values.get("suite"))
        results = self.suites.setdefault(name, SuiteResults())
        results.history.add(at_s, values.get("mean"))
        results.last = dict(values)
        self._record(
            at_s,
            f"{name} mean@{decimal(values.get('num_samples'), 0)} {decimal(values.get('mean'), 3)}"
            f" at v{decimal(values.get('policy_version'), 0)}",
        )

    def _handle_end(self, at_s: float, values: Mapping[str, Value]) -> None:
        self.outcome, self.reason = outcome_of(values), single_line(values.get("reason"))
        self.values["eta_s"] = None
        self._record(at_s, outcome_sentence(self.outcome, self.reason))


def actors_alive_text(values: Mapping[str, Value]) -> str:
    expected = values.get("actors_total")
    alive = count(values.get("actors_alive"))
    return alive if expected is None else f"{alive}/{count(expected)}"
