"""How a run ended and what ails it, read from events: what panel and lines have in common."""

import re
from collections.abc import Mapping

from speed_async.observability.metrics import Value

OUTCOMES = {
    "completed": "finished",
    "stopped": "stopped",
    "nothing_learned": "nothing learned",
    "failed": "failed",
}
"""The word that people read for each outcome."""
FIGURES = re.compile(r"[\d.,]*\d")


def outcome_of(values: Mapping[str, Value]) -> str:
    """Of an end event. What is not known to have gone well has failed."""
    outcome = values.get("outcome", "completed" if values.get("ok") is True else "failed")
    return outcome if isinstance(outcome, str) and outcome in OUTCOMES else "failed"


def told_outcome(outcome: str, reason: str) -> str:
    """Both, as one sentence; `reason` may begin with the very word."""
    word = OUTCOMES[outcome]
    return reason if reason.startswith(word) else f"{word}: {reason}"


def identity_of(diagnosis: str) -> str:
    """What stays of a diagnosis while its figures change."""
    return FIGURES.sub("0", diagnosis)
