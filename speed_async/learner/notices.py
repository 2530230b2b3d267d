"""What the learner has to say to the user: its log, and notices for the service and the summary."""

import contextlib
import sys
from collections.abc import Sequence


class Notices:
    def __init__(self, earlier: Sequence[str] = ()) -> None:
        """`earlier`: notices from before the learner had connected."""
        self.all = list(earlier)
        """All notices of this attempt."""
        self._unsent = ""

    def add(self, notice: str) -> None:
        """Add a notice to the log, to the next message to the service and to the final summary."""
        self.log(notice)
        self.all.append(notice)
        self._unsent = notice

    def take_unsent(self) -> str:
        """The notice that the service has not got yet, or an empty text. It is then sent."""
        notice, self._unsent = self._unsent, ""
        return notice

    def log(self, text: str) -> None:
        """Add a line to the log only."""
        with contextlib.suppress(OSError):  # the log may be on a full disk
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
