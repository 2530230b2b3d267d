"""How long the learner has spent on each of its activities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Activity = Literal["wait", "train", "sync", "checkpoint"]
"""For a batch; gradient and step; for a broadcast; for the pause that a checkpoint needs between
two updates (the journal, the end of the broadcast, the copy of the state)."""
ACTIVITIES: tuple[Activity, ...] = ("wait", "train", "sync", "checkpoint")


class ActivityTimes:
    """Seconds by activity. Of nested activities, each second counts for the inner one only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._totals_s: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)

    @contextmanager
    def measure(self, activity: Activity) -> Iterator[None]:
        """Inner activities may be in another thread, while this one waits for it."""
        started_s, before_s = self._clock(), sum(self._totals_s.values())
        try:
            yield
        finally:
            inner_s = sum(self._totals_s.values()) - before_s
            self._totals_s[activity] += self._clock() - started_s - inner_s

    def take(self) -> dict[str, float]:
        """Metrics `time/ACTIVITY_s` since the last call."""
        taken_s, self._totals_s = self._totals_s, dict.fromkeys(ACTIVITIES, 0.0)
        return {f"time/{activity}_s": total_s for activity, total_s in taken_s.items()}
