"""Results of the preflight checks: errors, warnings, and sections, and the text that shows them."""

from dataclasses import dataclass, field

from speed_async.errors import NotAvailableHere, SpeedAsyncError
from speed_async.observability.notation import counted

CHECKED = "SPEED_ASYNC_CHECKED"
"""Environment variable that `speed-async train` sets for its ranks after running the checks."""


@dataclass(kw_only=True, slots=True)
class Findings:
    errors: list[SpeedAsyncError] = field(default_factory=list)
    """Each of them prevents the run."""
    warnings: list[str] = field(default_factory=list)
    """The run works, but perhaps not as intended."""
    not_checked: list[SpeedAsyncError] = field(default_factory=list)
    """What could not be checked, because this machine lacks it (see `set_aside`)."""
    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    """Headings and lines that `speed-async check` prints."""

    def show(self, heading: str, lines: list[str]) -> None:
        self.sections.append((heading, lines))

    def set_aside(self, kind: type[NotAvailableHere]) -> None:
        """Move errors of this kind to `not_checked`."""
        self.not_checked += [each for each in self.errors if isinstance(each, kind)]
        self.errors = [each for each in self.errors if not isinstance(each, kind)]


class PreflightError(SpeedAsyncError):
    """Several errors; the message lists all of them."""

    def __init__(self, errors: list[SpeedAsyncError]) -> None:
        listed = "".join(f"\n  {error}" for error in errors)
        super().__init__(f"{len(errors)} errors prevent this run from starting:{listed}")
        self.errors = tuple(errors)


def report(findings: Findings) -> str:
    """The text of `speed-async check` and `speed-async train --dry-run`. The last line starts with
    `ok` or has the number of errors."""
    lines: list[str] = []
    for heading, shown in findings.sections:
        lines.append(heading)
        lines += [f"  {line}" for line in shown]
    lines += [f"warning: {warning}" for warning in findings.warnings]
    lines += [f"not checked here: {error}" for error in findings.not_checked]
    lines += [f"error: {error}" for error in findings.errors]
    lines.append(_conclusion(findings))
    return "\n".join(lines)


def _conclusion(findings: Findings) -> str:
    if findings.errors:
        return counted(len(findings.errors), "error")
    reservations = []
    if findings.warnings:
        reservations.append(counted(len(findings.warnings), "warning"))
    if findings.not_checked:
        reservations.append(f"{len(findings.not_checked)} not checked here")
    return f"ok, but {', '.join(reservations)}" if reservations else "ok"
