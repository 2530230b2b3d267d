"""What the panel knows, grown from events alone. No terminal, no clock: time is `wall_s`."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from speed_async.observability.metrics import Event, Value
from speed_async.observability.notation import (
    count,
    decimal,
    duration,
    finite,
    single_line,
    split_lines,
)
from speed_async.observability.outcomes import identity_of, outcome_of, told_outcome
from speed_async.observability.panel.histories import History, Recent

NUM_RECENT_EVENTS = 64
NUM_SAMPLES = 3
ACTOR_LAG = "weights/lag/"
"""Begins a key for each actor that is here."""
GAUGE_KINDS = ("status", "step", "end")


@dataclass(slots=True)
class PanelState:
    """Latest value of every key, the histories behind the sparklines, and what happened."""

    title: str
    values: dict[str, Value] = field(default_factory=dict)
    reward: History = field(default_factory=History)
    accuracy: History = field(default_factory=History)
    generated: Recent = field(default_factory=Recent)
    trained: Recent = field(default_factory=Recent)
    recent_events: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_EVENTS))
    """One line each, the newest last."""
    samples: deque[dict[str, Value]] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    """Values of the latest sample events, the newest last."""
    outcome: str | None = None
    """None while the run goes on."""
    reason: str = ""
    """Of the outcome."""
    stage_since_s: float = 0.0
    """When the present phase began."""
    had_actors: bool = False
    """Since the learner came, or came again: before that none is missing."""

    def update(self, event: Event) -> None:
        wall_s = finite(event.values.get("wall_s"))
        at_s = self.wall_s if wall_s is None else wall_s
        if event.kind == "sample":
            self.samples.append(event.values)
            return
        if event.kind in GAUGE_KINDS:
            if event.kind != "end":
                self.outcome, self.reason = None, ""  # a run that was resumed goes on
            self._compare(at_s, event.values)
            for key in [key for key in self.values if key.startswith(ACTOR_LAG)]:
                del self.values[key]  # the actor may be gone
            self.values.update(event.values)
            if event.values.get("learner_here") is False:
                self.had_actors = False
            elif finite(event.values.get("actors_alive")):
                self.had_actors = True
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

    @property
    def last_event(self) -> str | None:
        return self.recent_events[-1] if self.recent_events else None

    @property
    def warnings(self) -> list[str]:
        return split_lines(self.values.get("warning"))

    @property
    def diagnoses(self) -> list[str]:
        return split_lines(self.values.get("diagnoses"))

    def _compare(self, at_s: float, values: Mapping[str, Value]) -> None:
        """Note what is another than before."""
        before = self.values
        if values.get("phase") != before.get("phase"):
            self.stage_since_s = at_s
        if values.get("learner_here") and not before.get("learner_here"):
            self._note(at_s, "the learner has loaded the model")
        alive, alive_before = values.get("actors_alive"), before.get("actors_alive")
        if alive is not None and alive != (alive_before or 0):
            self._note(at_s, f"actors {actors_here(values)}")
        for warning in split_lines(values.get("warning")):
            if warning not in self.warnings:
                self._note(at_s, f"! {warning}")
        known = set(map(identity_of, self.diagnoses))
        for diagnosis in split_lines(values.get("diagnoses")):
            if identity_of(diagnosis) not in known:
                self._note(at_s, f"✗ {diagnosis}")

    def _note(self, at_s: float, text: str) -> None:
        self.recent_events.append(f"{duration(at_s)}  {text}")

    def _evaluated(self, at_s: float, values: Mapping[str, Value]) -> None:
        accuracy = values.get("accuracy")
        self.accuracy.add(at_s, accuracy)
        self.values["accuracy"] = accuracy
        self._note(
            at_s,
            f"held-out {decimal(accuracy, 3)} at v{decimal(values.get('policy_version'), 0)},"
            f" {decimal(values.get('num_passed'), 0)}"
            f"/{decimal(values.get('num_completions'), 0)} passed",
        )

    def _ended(self, at_s: float, values: Mapping[str, Value]) -> None:
        self.outcome, self.reason = outcome_of(values), single_line(values.get("reason"))
        self.values["eta_s"] = None
        self._note(at_s, told_outcome(self.outcome, self.reason))


def actors_here(values: Mapping[str, Value]) -> str:
    wanted = values.get("actors_total")
    return count(values.get("actors_alive")) + (f"/{count(wanted)}" if wanted is not None else "")
