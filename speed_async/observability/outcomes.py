"""Outcomes and diagnoses of a run, shared by the panel and the plain-text output."""

import re
from collections.abc import Mapping

from speed_async.observability.metrics import Value

OUTCOMES = {
    "completed": "finished",
    "stopped": "stopped",
    "nothing_learned": "nothing learned",
    "failed": "failed",
}
"""Displayed name of each outcome."""
NUMBERS = re.compile(r"[\d.,]*\d")


def outcome_of(values: Mapping[str, Value]) -> str:
    """Outcome of an end event. Anything not known to be successful is "failed"."""
    outcome = values.get("outcome", "completed" if values.get("ok") is True else "failed")
    return outcome if isinstance(outcome, str) and outcome in OUTCOMES else "failed"


def outcome_sentence(outcome: str, reason: str) -> str:
    """Combine outcome and reason; `reason` may already begin with the outcome."""
    label = OUTCOMES[outcome]
    return reason if reason.startswith(label) else f"{label}: {reason}"


def identity_of(diagnosis: str) -> str:
    """A diagnosis with its numbers masked, to identify it while the numbers change."""
    return NUMBERS.sub("0", diagnosis)
