"""Evaluation of the runs of benchmarks/time_to_accuracy.py: target crossings, bootstrap intervals,
a table and a figure. Free of side effects except for the two files it writes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

TARGETS = {"real": (0.40, 0.50, 0.58), "mild": (0.50, 0.70, 0.85)}
"""Low, mid and high targets, in held-out accuracy. At the real spread 35 % of the held-out prompts
are out of reach, so the maximum is 0.65."""
BASE_ARM = "sync-rloo"
TRL_ARM = "trl-rloo"
NUM_RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)
MARKER = "<!-- made by `python -m benchmarks.time_to_accuracy report` -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A held-out accuracy and its cost since the end of the first evaluation."""

    updates: float
    wall_s: float
    tokens: float  # generated for training: trained, screened out, stale and unfinished
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run to make."""

    spread: str
    arm: str
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        return (self.spread, self.arm, self.lr, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Job):
    """A finished job and its results."""

    points: list[Point]
    process_s: float

    def reach(self, target: float) -> Point | None:
        """The interpolated point of first reaching `target`. None if it is never reached."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if before.accuracy < target <= after.accuracy:
                part = (target - before.accuracy) / (after.accuracy - before.accuracy)
                return _between(before, after, part)
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        points = [Point(**point) for point in value.pop("points")]
        return cls(**value, points=points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A median over seeds and its bootstrap interval. Infinite where seeds miss the target."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.median):
            return "not reached"
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


def _between(before: Point, after: Point, part: float) -> Point:
    def at(of: Callable[[Point], float]) -> float:
        return of(before) + part * (of(after) - of(before))

    return Point(
        updates=at(lambda p: p.updates),
        wall_s=at(lambda p: p.wall_s),
        tokens=at(lambda p: p.tokens),
        accuracy=at(lambda p: p.accuracy),
    )


def costs(runs: Sequence[Run], target: float, of: Callable[[Point], float]) -> list[float]:
    """One cost per run; infinity where the target was not reached."""
    points = [run.reach(target) for run in runs]
    return [math.inf if point is None else of(point) for point in points]


def interval(values: Sequence[float]) -> Interval:
    """Median of the seeds, and the percentile bootstrap of that median (Efron 1979)."""
    array = np.array(values)
    medians = _resampled_medians(array, np.random.default_rng(0))
    low, high = np.percentile(medians, INTERVAL, method="nearest")
    return Interval(median=float(np.median(array)), low=float(low), high=float(high))


def ratio_interval(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Ratio of medians, with both sides resampled independently. inf / inf counts as inf."""
    rng = np.random.default_rng(0)
    above, below = np.array(values), np.array(base)
    with np.errstate(invalid="ignore"):
        ratios = _resampled_medians(above, rng) / _resampled_medians(below, rng)
        median = float(np.median(above) / np.median(below))
    ratios = np.nan_to_num(ratios, nan=math.inf, posinf=math.inf)
    low, high = np.percentile(ratios, INTERVAL, method="nearest")
    median = math.inf if math.isnan(median) else median
    return Interval(median=median, low=float(low), high=float(high))


def _resampled_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    return np.sort(values[drawn], axis=1)[:, (len(values) - 1) // 2]


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


# --- table ------------------------------------------------------------------------------------


def table(
    runs: Sequence[Run],
    rows: Sequence[tuple[str, float]],
    targets: Sequence[float],
    *,
    base_lr: float,
    outside_lr: float,
) -> list[str]:
    """A Markdown table: one row per arm and learning rate, medians over seeds with intervals."""
    _, mid, high = targets
    base = [run for run in runs if (run.arm, run.lr) == (BASE_ARM, base_lr)]
    outside = [run for run in runs if (run.arm, run.lr) == (TRL_ARM, outside_lr)]
    head = ["arm", "lr", "seeds", *(f"s to {target:.0%}" for target in targets)]
    head += [f"updates to {mid:.0%}", f"updates to {high:.0%}", f"tokens to {mid:.0%}"]
    head += [f"wall-clock to {mid:.0%} / {BASE_ARM}", f"/ {TRL_ARM}"]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm, lr in rows:
        own = [run for run in runs if (run.arm, run.lr) == (arm, lr)]
        if not own:
            continue
        cells = [arm, f"{lr:.0e}".replace("e-0", "e-"), str(len(own))]
        cells += [str(interval(costs(own, t, lambda p: p.wall_s))) for t in targets]
        cells += [str(interval(costs(own, t, lambda p: p.updates))) for t in (mid, high)]
        cells.append(str(interval(costs(own, mid, lambda p: p.tokens))))
        walls = costs(own, mid, lambda p: p.wall_s)
        for other in (base, outside):
            others = costs(other, mid, lambda p: p.wall_s)
            if not others:
                cells.append("not run")
            elif math.isinf(np.median(others)) and not math.isinf(np.median(walls)):
                cells.append("baseline did not reach it")
            else:
                cells.append(str(ratio_interval(walls, others)))
        lines.append(_row(cells))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_report(
    runs: Sequence[Run],
    chosen: Mapping[tuple[str, str], float],
    arms: Sequence[str],
    variants: Sequence[str],
    docs: Path,
) -> None:
    """Write the tables to docs/time_to_accuracy.md after its marker, and draw the figure.

    `chosen` gives the learning rate of a spread and arm. Ratios are relative to the base and TRL
    arms at the rate that was best for them in hindsight, so their tuning cannot favour the others.
    """
    path = docs / "time_to_accuracy.md"
    text, found, _ = path.read_text().partition(MARKER)
    if not found:
        raise ValueError(f"{path} has no marker line: {MARKER}")
    lines = [MARKER]
    spreads = sorted({run.spread for run in runs}, reverse=True)
    for spread in spreads:
        own = [run for run in runs if run.spread == spread]
        rates = {arm: sorted({run.lr for run in own if run.arm == arm}) for arm in arms}
        references = {
            "base_lr": hindsight_lr(own, BASE_ARM),
            "outside_lr": hindsight_lr(own, TRL_ARM),
        }
        parts = {
            "": arms,
            f"Variants of asynchronous SPEED, {spread} spread": variants,
        }
        for title, some in parts.items():
            rows = [(arm, chosen[spread, arm]) for arm in some if (spread, arm) in chosen]
            lines += ["", f"### {title or f'Spread: {spread}'}", ""] if rows else []
            lines += table(own, rows, TARGETS[spread], **references) if rows else []
        every = [(arm, lr) for arm in arms for lr in rates[arm] if len(rates[arm]) > 1]
        if every:
            lines += ["", f"### References at every learning rate, {spread} spread", ""]
            lines += table(own, every, TARGETS[spread], **references)
    path.write_text(text + "\n".join(lines) + "\n")
    shown = [run for run in runs if run.lr == chosen[run.spread, run.arm]]
    draw(shown, arms, spreads, docs / "time_to_accuracy.png")


def hindsight_lr(runs: Sequence[Run], arm: str) -> float:
    """The rate whose seeds reached the mid target first (else the best last accuracy). 0 if the
    arm was not run."""
    arm_runs = [run for run in runs if run.arm == arm]
    if not arm_runs:
        return 0.0
    _, mid, _ = TARGETS[arm_runs[0].spread]

    def cost_of(lr: float) -> tuple[float, float]:
        own = [run for run in arm_runs if run.lr == lr]
        last = float(np.median([run.points[-1].accuracy for run in own]))
        return float(np.median(costs(own, mid, lambda p: p.wall_s))), -last

    return min({run.lr for run in arm_runs}, key=cost_of)


# --- figure -----------------------------------------------------------------------------------


def draw(runs: Sequence[Run], arms: Sequence[str], spreads: Sequence[str], path: Path) -> None:
    """Plot median accuracy over seeds against wall-clock time and generated tokens."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6 * len(spreads)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(spreads), 2, squeeze=False)
    colours = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]  # type: ignore[attr-defined]
    for row, spread in zip(grid, spreads, strict=True):
        for axes, name, of in (
            (row[0], "wall-clock since training began (s)", lambda p: p.wall_s),
            (row[1], "tokens generated for training", lambda p: p.tokens),
        ):
            for colour, arm in zip(colours, arms, strict=False):
                own = [run for run in runs if (run.spread, run.arm) == (spread, arm)]
                if own:
                    style = "--" if arm.startswith("sync") else ":" if arm == TRL_ARM else "-"
                    xs, ys = median_curve(own, of)
                    axes.plot(xs, ys, style, color=colour, label=arm, linewidth=1.8)
            for target in TARGETS[spread]:
                axes.axhline(target, color="0.85", linewidth=0.8, zorder=0)
            axes.set_xlabel(name)
            axes.set_ylabel("held-out accuracy")
            axes.set_title(f"{spread} spread", loc="left", fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def median_curve(
    runs: Sequence[Run], of: Callable[[Point], float]
) -> tuple[list[float], list[float]]:
    """Median over seeds at equal cost, up to the lowest final cost of any seed."""
    end = min(of(run.points[-1]) for run in runs)
    xs = np.linspace(0.0, end, 60)
    ys = [
        np.interp(xs, [of(p) for p in run.points], [p.accuracy for p in run.points]) for run in runs
    ]
    return xs.tolist(), np.median(ys, axis=0).tolist()
