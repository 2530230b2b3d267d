"""The tables and the figure of docs/time_to_accuracy.md, from the recorded runs only."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.figure import draw
from benchmarks.evidence.plan import (
    BASE,
    COMPARISONS,
    DECIDING_SEEDS,
    SPREADS,
    TUNING_SEEDS,
    Comparison,
    Endpoint,
    Setting,
)
from benchmarks.evidence.records import Record
from benchmarks.evidence.statistics import Ratio, compare, holm
from benchmarks.evidence.tuning import Tuning, chosen_setting, resolve

MARKER = "<!-- made by `python -m benchmarks.evidence report` -->"
LEVEL = 0.05
UNITS = {"tokens": "tokens", "core_s": "core-seconds", "wall_s": "seconds"}


class Evidence:
    """The evaluation runs of each arm, at the setting that its tuning chose."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._runs: dict[tuple[str, str], list[Record]] = {}
        for spread, plan in SPREADS.items():
            for arm in plan.arms:
                setting = chosen_setting(spread, arm, records)
                self._runs[spread, arm] = [
                    record
                    for record in records
                    if (record.spread, record.arm, record.setting) == (spread, arm, setting)
                    and record.seed not in TUNING_SEEDS
                ]

    def runs(self, spread: str, arm: str, endpoint: Endpoint) -> dict[int, Record]:
        """By seed. Of endpoints in seconds, only runs on an idle machine. Of repeated runs, the
        first one: a later one does not replace a result."""
        runs: dict[int, Record] = {}
        for record in self._runs[spread, arm]:
            if endpoint == "tokens" or record.is_idle:
                runs.setdefault(record.seed, record)
        return runs

    def costs(self, spread: str, arm: str, endpoint: Endpoint, target: float) -> dict[int, float]:
        horizon_tokens = SPREADS[spread].horizon_tokens
        return {
            seed: record.cost(endpoint, target, horizon_tokens)
            for seed, record in self.runs(spread, arm, endpoint).items()
        }

    def ratio(
        self, spread: str, arm: str, base: str, endpoint: Endpoint, target: float
    ) -> Ratio | None:
        """Paired by seed; None without common seeds."""
        own = self.costs(spread, arm, endpoint, target)
        other = self.costs(spread, base, endpoint, target)
        seeds = sorted(own.keys() & other.keys())
        if not seeds:
            return None
        return compare([own[seed] for seed in seeds], [other[seed] for seed in seeds])

    def num_seeds(self, spread: str, arm: str, base: str, endpoint: Endpoint) -> int:
        """Common seeds of two arms."""
        runs = self.runs(spread, arm, endpoint), self.runs(spread, base, endpoint)
        return len(runs[0].keys() & runs[1].keys())


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Replaces what follows the marker in docs/time_to_accuracy.md, and the figure.

    Raises ValueError if the page has no marker.
    """
    path = docs / "time_to_accuracy.md"
    text, found, _ = path.read_text().partition(MARKER)
    if not found:
        raise ValueError(f"{path} has no line {MARKER}: add it where the results belong")
    evidence = Evidence(records)
    lines = [MARKER, "", *_summary(records), "", "### Deciding comparisons", ""]
    lines += _deciding(evidence)
    shown = [
        (spread, arm)
        for spread, plan in SPREADS.items()
        for arm in plan.arms
        if evidence.runs(spread, arm, "tokens")
    ]
    if shown:
        draw({key: list(evidence.runs(*key, "tokens").values()) for key in shown}, docs)
        lines += ["", "![Median accuracy against generated tokens](time_to_accuracy.png)"]
    for spread in SPREADS:
        arms = [arm for name, arm in shown if name == spread]
        lines += ["", f"### Arms, {spread} spread", "", *_arms(evidence, spread, arms)] * bool(arms)
        lines += _tuning(spread, records)
    path.write_text(text + "\n".join(lines) + "\n")


def _summary(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No run is recorded."]
    commits = sorted({record.commit for record in records})
    tuning = sum(record.seed in TUNING_SEEDS for record in records)
    early = sum(record.ended != "horizon" for record in records)
    return [
        f"{tuning} tuning runs and {len(records) - tuning} evaluation runs are recorded; "
        f"{sum(record.is_idle for record in records)} of all were made on an idle machine, and "
        f"{early} ended before their horizon. Commits: {', '.join(commits)}."
    ]


def _deciding(evidence: Evidence) -> list[str]:
    """One row per comparison and target. A comparison has no p-value until all its seeds are made,
    so that nobody can stop at a convenient number of them."""
    rows: list[list[str]] = []
    decided: list[tuple[int, Comparison, Ratio]] = []
    for comparison in COMPARISONS:
        spread = comparison.spread
        arm, base = (
            resolve(spread, name, evidence.records) for name in (comparison.arm, comparison.base)
        )
        for target in SPREADS[spread].targets:
            cells = [spread, f"{arm or comparison.arm} / {base or comparison.base}"]
            cells += [f"{UNITS[comparison.endpoint]} to {target:.0%}", f"{comparison.aim}"]
            made = 0
            if arm is not None and base is not None:
                made = evidence.num_seeds(spread, arm, base, comparison.endpoint)
                ratio = evidence.ratio(spread, arm, base, comparison.endpoint, target)
                if made == len(DECIDING_SEEDS) and ratio is not None:
                    decided.append((len(rows), comparison, ratio))
            rows.append([*cells, str(made), "", "", "not decided"])
    adjusted = holm([ratio.p_value for *_, ratio in decided] + [1.0] * (len(rows) - len(decided)))
    for (row, comparison, ratio), p_value in zip(decided, adjusted, strict=False):
        rows[row][5:] = [_ratio(ratio), f"{p_value:.2g}", _verdict(ratio, comparison.aim)]
    head = ["spread", "arms", "endpoint", "aim", "seeds", "ratio (95 %)", "p, Holm", "aim met"]
    return _table(head, rows)


def _verdict(ratio: Ratio, aim: float) -> str:
    if ratio.high <= aim:
        return "yes"
    return "no" if ratio.low > aim else "open"


def _arms(evidence: Evidence, spread: str, arms: Sequence[str]) -> list[str]:
    targets = SPREADS[spread].targets
    head = ["arm", "setting", "seeds", *(f"tokens to {target:.0%}" for target in targets)]
    head += [f"ratio to {BASE}, {target:.0%}" for target in targets]
    head += [f"{UNITS[each]} to {targets[0]:.0%}" for each in ("core_s", "wall_s")]
    rows = []
    for arm in arms:
        setting = chosen_setting(spread, arm, evidence.records)
        assert setting is not None
        cells = [arm, _setting(setting), str(len(evidence.runs(spread, arm, "tokens")))]
        cells += [_median(evidence.costs(spread, arm, "tokens", target)) for target in targets]
        for target in targets:
            ratio = evidence.ratio(spread, arm, BASE, "tokens", target)
            cells.append("" if ratio is None else _ratio(ratio))
        endpoints: tuple[Endpoint, ...] = ("core_s", "wall_s")
        cells += [_median(evidence.costs(spread, arm, each, targets[0])) for each in endpoints]
        rows.append(cells)
    return _table(head, rows)


def _tuning(spread: str, records: Sequence[Record]) -> list[str]:
    rows = []
    for arm in SPREADS[spread].arms:
        tuning = Tuning(spread, arm, records)
        if (chosen := tuning.chosen) is not None:
            rows.append([arm, _setting(chosen), f"{math.exp(tuning.best_score):,.0f}"])
    if not rows:
        return []
    head = ["arm", "chosen setting", "score (tokens)"]
    return ["", f"### Tuning, {spread} spread", "", *_table(head, rows)]


def _setting(setting: Setting) -> str:
    lr = f"{setting.lr:.0e}".replace("e-0", "e-")
    return f"lr {lr}, clip {setting.clip:.2g}, {setting.shape} per prompt"


def _median(costs: dict[int, float]) -> str:
    if not costs:
        return "not measured"
    reached = sum(map(math.isfinite, costs.values()))
    return f"{_number(statistics.median_high(costs.values()))} ({reached} of {len(costs)})"


def _ratio(ratio: Ratio) -> str:
    if not ratio.num_pairs:
        return "neither arrives"
    return f"{_number(ratio.estimate)} ({_number(ratio.low)} to {_number(ratio.high)})"


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
