"""The text that `speed-async check` prints."""

from speed_async.launcher.preflight.findings import Findings


def report(findings: Findings) -> str:
    """Format all findings; the last line is `ok` or the number of errors."""
    lines: list[str] = []
    for heading, shown in findings.sections:
        lines.append(heading)
        lines += [f"  {line}" for line in shown]
    lines += [f"warning: {warning}" for warning in findings.warnings]
    lines += [f"error: {error}" for error in findings.errors]
    count = len(findings.errors)
    lines.append("ok" if not count else f"{count} error{'s' if count > 1 else ''}")
    return "\n".join(lines)
