"""Current warnings: one sentence per topic, until the topic is closed."""

from dataclasses import dataclass, field

from speed_async.observability.notation import single_line

TRANSIENT_S = 60.0
"""How long a warning about a past event that needs no action is shown."""


@dataclass(kw_only=True, slots=True)
class WarningsState:
    texts: dict[str, str] = field(default_factory=dict)
    """The open warnings by topic, the latest last."""
    transient: set[str] = field(default_factory=set)
    first_shown_s: dict[str, float] = field(default_factory=dict)
    """When each transient warning was first seen by `close_expired`."""


class Warnings:
    """Holds the open warnings. The events that carry them are their record."""

    def __init__(self, state: WarningsState) -> None:
        self._state = state
        self._notes = ""

    def show_first(self, notes: str) -> None:
        """Show these losses, found at recovery, before every warning."""
        self._notes = notes

    def open(self, topic: str, text: str, *, transient: bool = False) -> None:
        """Open a warning on the topic, replacing an earlier one."""
        self.close(topic)
        self._state.texts[topic] = text
        if transient:
            self._state.transient.add(topic)

    def close(self, topic: str) -> None:
        """Close the topic if it is open."""
        self._state.texts.pop(topic, None)
        self._state.first_shown_s.pop(topic, None)
        self._state.transient.discard(topic)

    def close_expired(self, now_s: float) -> None:
        """Close the transient warnings that have been shown for TRANSIENT_S."""
        for topic in sorted(self._state.transient):
            if now_s - self._state.first_shown_s.setdefault(topic, now_s) >= TRANSIENT_S:
                self.close(topic)

    @property
    def text(self) -> str:
        """The notes and all open warnings, one per line, the latest last."""
        return "\n".join(filter(None, (self._notes, *map(single_line, self._state.texts.values()))))
