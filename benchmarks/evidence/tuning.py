"""The one rule that tunes every arm, on seeds that no evaluation uses.

Every setting of the grid runs with the first tuning seed. The `NUM_SURVIVORS` settings with the
best scores run with the other tuning seeds too. The one with the best mean score over all tuning
seeds is chosen. Evaluation seeds never enter.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.plan import (
    ARMS,
    NUM_SURVIVORS,
    SPREADS,
    TUNING_SEEDS,
    Setting,
    settings,
)
from benchmarks.evidence.records import Record


def score(record: Record) -> float:
    """Mean over the targets of the log of the tokens to the target; lower is better.

    A run that does not reach a target counts as the horizon, times 1 plus ten times the missing
    accuracy at its end, so that runs which come closer have better scores.
    """
    plan = SPREADS[record.spread]
    logs = []
    for target in plan.targets:
        tokens = record.cost("tokens", target, plan.horizon_tokens)
        if math.isinf(tokens):
            missing = max(0.0, target - record.points[-1].accuracy)
            tokens = plan.horizon_tokens * (1 + 10 * missing)
        logs.append(math.log(tokens))
    return statistics.fmean(logs)


class Tuning:
    """What the rule says about one arm at one spread, given the records so far."""

    def __init__(self, spread: str, arm: str, records: Sequence[Record]) -> None:
        self._settings = settings(ARMS[arm])
        self._scores: Mapping[tuple[Setting, int], float] = {
            (record.setting, record.seed): score(record)
            for record in records
            if (record.spread, record.arm) == (spread, arm) and record.seed in TUNING_SEEDS
        }

    @property
    def pending(self) -> list[tuple[Setting, int]]:
        """Runs that can be made now. Empty when the tuning is complete."""
        first, *others = TUNING_SEEDS
        jobs = [(setting, first) for setting in self._settings]
        if all(job in self._scores for job in jobs):
            jobs = [(setting, seed) for setting in self._survivors for seed in others]
        return [job for job in jobs if job not in self._scores]

    @property
    def _survivors(self) -> list[Setting]:
        first = TUNING_SEEDS[0]
        return sorted(self._settings, key=lambda each: self._scores[each, first])[:NUM_SURVIVORS]

    @property
    def chosen(self) -> Setting | None:
        """None while runs are pending."""
        return None if self.pending else min(self._survivors, key=self.mean_score)

    @property
    def best_score(self) -> float:
        """Mean score of the chosen setting; infinite while runs are pending."""
        chosen = self.chosen
        return math.inf if chosen is None else self.mean_score(chosen)

    def mean_score(self, setting: Setting) -> float:
        return statistics.fmean(self._scores[setting, seed] for seed in TUNING_SEEDS)


def chosen_setting(spread: str, arm: str, records: Sequence[Record]) -> Setting | None:
    """The setting of an arm: its own, or that of the arm that it is tuned as."""
    return Tuning(spread, ARMS[arm].tuned_as or arm, records).chosen


def resolve(spread: str, name: str, records: Sequence[Record]) -> str | None:
    """The arm that a name of a comparison stands for. None until all candidates are tuned."""
    prefix, is_family, suffix = name.partition("*")
    if not is_family:
        return name
    candidates = [
        arm for arm in SPREADS[spread].arms if arm.startswith(prefix) and not ARMS[arm].tuned_as
    ]
    scores = {arm: Tuning(spread, arm, records).best_score for arm in candidates}
    if any(map(math.isinf, scores.values())):
        return None
    return min(candidates, key=lambda arm: scores[arm]) + suffix
