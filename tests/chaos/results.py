"""What came of a drill: one round for each fault, and figures over many of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from chaos.witness import Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One fault and what came of it."""

    kind: str
    what: str
    recovered_s: float
    """From the fault until the run was whole again and past every version from before."""
    from_version: int
    to_version: int
    service_bytes: int
    """Resident memory of the service afterwards."""


@dataclass(kw_only=True)
class Result:
    rounds: list[Round] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Faults that had nothing to hit."""
    warnings: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    seconds: float = 0.0


def medians(rounds: Iterable[Round]) -> dict[str, tuple[int, float, float]]:
    """(how many, median, longest recovery in seconds) by kind."""
    by_kind: dict[str, list[float]] = {}
    for each in rounds:
        by_kind.setdefault(each.kind, []).append(each.recovered_s)
    return {
        kind: (len(times), sorted(times)[len(times) // 2], max(times))
        for kind, times in sorted(by_kind.items())
    }


def service_growth(rounds: list[Round]) -> float:
    """Largest memory of the service in the last third of a drill over that in the first."""
    sizes = [each.service_bytes for each in rounds if each.service_bytes]
    third = max(1, len(sizes) // 3)
    return max(sizes[-third:], default=1) / max(sizes[:third], default=1)
