"""What the checks before a run have found: errors, warnings, and what there is to show."""

from dataclasses import dataclass, field

from speed_async.errors import SpeedAsyncError

CHECKED = "SPEED_ASYNC_CHECKED"
"""Environment variable by which `speed-async train` tells its ranks that it has checked already."""


@dataclass(kw_only=True, slots=True)
class Findings:
    errors: list[SpeedAsyncError] = field(default_factory=list)
    """Each would end the run."""
    warnings: list[str] = field(default_factory=list)
    """The run works, but perhaps not as it is meant."""
    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    """Headings with lines that `speed-async check` prints."""

    def show(self, heading: str, lines: list[str]) -> None:
        self.sections.append((heading, lines))


class PreflightError(SpeedAsyncError):
    """Several things are wrong; the text lists all of them."""

    def __init__(self, errors: list[SpeedAsyncError]) -> None:
        listed = "".join(f"\n  {error}" for error in errors)
        super().__init__(f"{len(errors)} things keep this run from starting:{listed}")
        self.errors = tuple(errors)
