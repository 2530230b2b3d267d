"""Results of the preflight checks: errors, warnings, and sections, and the text that shows them."""

from dataclasses import dataclass, field

from speed_async.errors import SpeedAsyncError

CHECKED = "SPEED_ASYNC_CHECKED"
"""Environment variable that `speed-async train` sets for its ranks after running the checks."""


@dataclass(kw_only=True, slots=True)
class Findings:
    errors: list[SpeedAsyncError] = field(default_factory=list)
    """Each of them prevents the run."""
    warnings: list[str] = field(default_factory=list)
    """The run works, but perhaps not as intended."""
    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    """Headings and lines that `speed-async check` prints."""

    def show(self, heading: str, lines: list[str]) -> None:
        self.sections.append((heading, lines))


class PreflightError(SpeedAsyncError):
    """Several errors; the message lists all of them."""

    def __init__(self, errors: list[SpeedAsyncError]) -> None:
        listed = "".join(f"\n  {error}" for error in errors)
        super().__init__(f"{len(errors)} errors prevent this run from starting:{listed}")
        self.errors = tuple(errors)


def report(findings: Findings) -> str:
    """The text of `speed-async check`. The last line is `ok` or the number of errors."""
    lines: list[str] = []
    for heading, shown in findings.sections:
        lines.append(heading)
        lines += [f"  {line}" for line in shown]
    lines += [f"warning: {warning}" for warning in findings.warnings]
    lines += [f"error: {error}" for error in findings.errors]
    count = len(findings.errors)
    lines.append("ok" if not count else f"{count} error{'s' if count > 1 else ''}")
    return "\n".join(lines)
