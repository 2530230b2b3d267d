"""The figure of docs/time_to_accuracy.md: median accuracy against generated tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.plan import ARMS, OTHER_SEEDS, SPREADS
from benchmarks.evidence.records import Record

NUM_POINTS = 80


def draw(runs: Mapping[tuple[str, str], Sequence[Record]], docs: Path) -> None:
    """Writes docs/time_to_accuracy.png: one panel per spread, one curve per arm with the
    seeds of OTHER_SEEDS. An arm that is tuned as another one trains as that, so it has none."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spreads = [spread for spread in SPREADS if any(name == spread for name, _ in runs)]
    figure = Figure(figsize=(6.5 * len(spreads), 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    arms = [name for name, arm in ARMS.items() if not arm.tuned_as]
    colours = dict(zip(arms, colormaps["tab20"](np.arange(len(arms)) % 20), strict=True))
    for axes, spread in zip(
        figure.subplots(1, len(spreads), squeeze=False)[0], spreads, strict=True
    ):
        for arm in arms:
            if len(own := runs.get((spread, arm), [])) >= len(OTHER_SEEDS):
                style = "-" if ARMS[arm].mode == "async" else ":" if ARMS[arm].trl else "--"
                axes.plot(*median_curve(own), style, color=colours[arm], label=arm, linewidth=1.6)
        for target in SPREADS[spread].targets:
            axes.axhline(target, color="0.85", linewidth=0.8, zorder=0)
        axes.set_xlabel("tokens generated for training")
        axes.set_ylabel("exact accuracy")
        axes.set_title(f"{spread} spread", loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(docs / "time_to_accuracy.png")


def median_curve(runs: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Median over seeds at equal tokens, up to the fewest tokens of any run."""
    end = min(run.points[-1].tokens for run in runs)
    xs = np.linspace(0.0, end, NUM_POINTS)
    ys = [
        np.interp(xs, [p.tokens for p in run.points], [p.accuracy for p in run.points])
        for run in runs
    ]
    return xs.tolist(), np.median(ys, axis=0).tolist()
