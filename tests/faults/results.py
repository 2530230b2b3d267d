"""Results of a drill: one round per fault, and figures over all rounds."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.faults.run_checker import Verdict

GROWTH = 1.5
"""Limit of the service's memory at the end of a short drill over that after its first faults. It
includes buffers, records of actor incarnations, and what differs from start to start: a service
that has just started has 49, 58 or 67 MB. The long drill has a lower limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One fault and its recovery."""

    kind: str
    what: str
    recovered_s: float
    """Time from the fault until the run has recovered and is past every earlier version."""
    from_version: int
    to_version: int
    service_bytes: int
    """Private memory of the service afterwards."""


@dataclass(kw_only=True)
class Result:
    rounds: list[Round] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Faults without a target."""
    warnings: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    seconds: float = 0.0


def medians(rounds: Iterable[Round]) -> dict[str, tuple[int, float, float]]:
    """(count, median, longest recovery in seconds) by kind."""
    by_kind: dict[str, list[float]] = {}
    for each in rounds:
        by_kind.setdefault(each.kind, []).append(each.recovered_s)
    return {
        kind: (len(times), sorted(times)[len(times) // 2], max(times))
        for kind, times in sorted(by_kind.items())
    }


def service_growth(rounds: list[Round]) -> float:
    """Maximum memory of the service in the last third of a drill over that in the first third."""
    sizes = [each.service_bytes for each in rounds if each.service_bytes]
    third = max(1, len(sizes) // 3)
    return max(sizes[-third:], default=1) / max(sizes[:third], default=1)
