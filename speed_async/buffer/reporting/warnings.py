"""Current warnings: one sentence per topic, until the topic is closed."""

from speed_async.observability.notation import single_line

TRANSIENT_S = 60.0
"""How long a warning about a past event that needs no action is shown."""


class Warnings:
    """Holds the open warnings. The events that carry them are their record."""

    CONFIGURED = ("_notes",)

    def __init__(self) -> None:
        self._notes = ""
        self._texts: dict[str, str] = {}
        self._first_shown_s: dict[str, float] = {}
        """When each transient warning was first seen by `close_expired`."""
        self._fleeting: set[str] = set()

    def show_first(self, notes: str) -> None:
        """Show these losses, found at recovery, before every warning."""
        self._notes = notes

    def open(self, topic: str, text: str, *, transient: bool = False) -> None:
        """Open a warning on the topic, replacing an earlier one."""
        self.close(topic)
        self._texts[topic] = text
        if transient:
            self._fleeting.add(topic)

    def close(self, topic: str) -> None:
        """Close the topic if it is open."""
        self._texts.pop(topic, None)
        self._first_shown_s.pop(topic, None)
        self._fleeting.discard(topic)

    def close_expired(self, now_s: float) -> None:
        """Close the transient warnings that have been shown for TRANSIENT_S."""
        for topic in sorted(self._fleeting):
            if now_s - self._first_shown_s.setdefault(topic, now_s) >= TRANSIENT_S:
                self.close(topic)

    @property
    def text(self) -> str:
        """The notes and all open warnings, one per line, the latest last."""
        return "\n".join(filter(None, (self._notes, *map(single_line, self._texts.values()))))
