"""Lengths of verified completions by the outcome of the verifier, as running sums.

Time-outs that grow with the length would teach a policy, or tell a reader, something about lengths
that is not about answers. The correlation shows whether they do.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from speed_async.types import VerifierOutcome

OUTCOMES: tuple[VerifierOutcome, ...] = get_args(VerifierOutcome)
SUMS = ("completions", "tokens", "squared_tokens")
GAUGES = tuple(f"verifier/{outcome}/{name}" for outcome in OUTCOMES for name in SUMS)
"""Names of the running sums."""


class OutcomeLengths:
    """The sums can be added over actors, and continued from earlier ones."""

    def __init__(self, sums: Mapping[str, float] = MappingProxyType({})) -> None:
        """`sums`: values by the names in GAUGES; missing ones are 0."""
        self.sums = {name: sums.get(name, 0.0) for name in GAUGES}

    def add(self, outcome: VerifierOutcome, num_tokens: int) -> None:
        for name, value in zip(SUMS, (1, num_tokens, num_tokens**2), strict=True):
            self.sums[f"verifier/{outcome}/{name}"] += value

    def num_completions(self, outcome: VerifierOutcome) -> int:
        return int(self._sums(outcome)[0])

    def mean_tokens(self, outcome: VerifierOutcome) -> float | None:
        """None without completions of this outcome."""
        count, total, _ = self._sums(outcome)
        return total / count if count else None

    def length_correlation(self, outcome: VerifierOutcome) -> float | None:
        """Point-biserial correlation of this outcome with the length, over the completions with
        this outcome and those that were scored.

        It is (m1 - m0) / s * sqrt(q (1 - q)), with the mean lengths m1 (this outcome) and m0
        (scored), the share q of this outcome, and the population standard deviation s of all
        lengths. None if one of both kinds is missing or all lengths are equal.
        """
        count, total, squares = self._sums(outcome)
        count_0, total_0, squares_0 = self._sums("scored")
        if not count or not count_0 or outcome == "scored":
            return None
        number = count + count_0
        mean = (total + total_0) / number
        variance = (squares + squares_0) / number - mean * mean
        if variance <= 1e-9 * mean * mean:  # rounding errors of equal lengths
            return None
        share = count / number
        difference = total / count - total_0 / count_0
        return difference * math.sqrt(share * (1 - share) / variance)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """By outcome: number of completions, mean length in tokens, and, except for `scored`, the
        correlation with the length."""
        table: dict[str, dict[str, float | None]] = {}
        for outcome in OUTCOMES:
            row = table[outcome] = {
                "completions": self.num_completions(outcome),
                "mean_tokens": self.mean_tokens(outcome),
            }
            if outcome != "scored":
                row["length_correlation"] = self.length_correlation(outcome)
        return table

    def _sums(self, outcome: VerifierOutcome) -> tuple[float, float, float]:
        count, total, squares = (self.sums[f"verifier/{outcome}/{name}"] for name in SUMS)
        return count, total, squares
