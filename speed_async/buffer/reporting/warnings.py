"""What a person should know of now: one sentence for each matter, until the matter is over."""

from speed_async.observability.notation import single_line

FLEETING_S = 60.0
"""A warning of what has happened, and needs nothing more, is shown for this long."""


class Warnings:
    """Pure bookkeeping. The events that carry the warnings are the record of them."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._told_s: dict[str, float] = {}
        """Of the fleeting ones: when they were first seen by `pass_time`."""
        self._fleeting: set[str] = set()

    def open(self, matter: str, text: str, *, fleeting: bool = False) -> None:
        """Say this of the matter from now on, in place of what was said of it."""
        self.close(matter)
        self._texts[matter] = text
        if fleeting:
            self._fleeting.add(matter)

    def close(self, matter: str) -> None:
        """The matter is over, if it was open."""
        self._texts.pop(matter, None)
        self._told_s.pop(matter, None)
        self._fleeting.discard(matter)

    def pass_time(self, now_s: float) -> None:
        """Close what has been said for long enough."""
        for matter in sorted(self._fleeting):
            if now_s - self._told_s.setdefault(matter, now_s) >= FLEETING_S:
                self.close(matter)

    @property
    def text(self) -> str:
        """All that is open, a line each, the latest last."""
        return "\n".join(map(single_line, self._texts.values()))
