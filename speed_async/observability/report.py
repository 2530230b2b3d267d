"""Human-readable report of a run: an accuracy plot and the final summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speed_async.observability.metrics import Event
from speed_async.observability.notation import finite
from speed_async.observability.sinks import METRICS_FILE, read_events
from speed_async.observability.summary import summary_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIGURE_FILE", "plot_accuracy", "summary_text"]

FIGURE_FILE = "accuracy.png"
ACCURACY_COLOUR, REWARD_COLOUR = "#0b5fa5", "#d98a29"
Point = tuple[float, float]


def plot_accuracy(run_folder: Path) -> Path:
    """Plot held-out accuracy and training reward over seconds since the start of the run.

    Reads `metrics.jsonl` and returns the path of `accuracy.png`. Raises DataError if the metrics
    are missing or malformed. With fewer than two evaluations the plot has a note.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_events(run_folder / METRICS_FILE)
    accuracy = _points(events, kind="evaluation", key="accuracy")
    reward = _points(events, kind="step", key="reward_mean")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    axes = figure.add_subplot()
    _draw_reward(axes, reward)
    _draw_accuracy(axes, accuracy)
    suites = suite_points(events)
    for name, points in suites.items():
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, label=name, clip_on=False)
    _add_labels(axes, title=run_folder.resolve().name, num_evaluations=len(accuracy))
    if accuracy or reward or suites:
        axes.legend(loc="best", frameon=False)
    else:
        axes.set_xlim(0.0, 1.0)
    path = run_folder / FIGURE_FILE
    figure.savefig(path)
    return path


def _points(events: Sequence[Event], *, kind: str, key: str) -> list[Point]:
    """(seconds, value) of all events of this kind that have both, sorted by time."""
    pairs = (
        (finite(event.values.get("wall_s")), finite(event.values.get(key)))
        for event in events
        if event.kind == kind
    )
    return sorted((at_s, value) for at_s, value in pairs if at_s is not None and value is not None)


def suite_points(events: Sequence[Event]) -> dict[str, list[Point]]:
    """(seconds, mean@k) by suite and k. A result is placed where the newest version that sampled it
    was trained."""
    trained_s = {0.0: 0.0}
    for event in events:
        version, at_s = (finite(event.values.get(key)) for key in ("policy_version", "wall_s"))
        if event.kind == "step" and version is not None and at_s is not None:
            trained_s[version] = at_s
    suites: dict[str, list[Point]] = {}
    for event in events:
        version, mean = (finite(event.values.get(key)) for key in ("policy_version", "mean"))
        if event.kind == "suite" and version in trained_s and mean is not None:
            name = f"{event.values.get('suite')} mean@{event.values.get('num_samples')}"
            suites.setdefault(name, []).append((trained_s[version], mean))
    return suites


def _draw_reward(axes: "Axes", points: Sequence[Point]) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=REWARD_COLOUR,
            alpha=0.55,
            linewidth=1.0,
            label="pass rate of training prompts, before the gate",
            zorder=2,
        )


def _draw_accuracy(axes: "Axes", points: Sequence[Point]) -> None:
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True),
        color=ACCURACY_COLOUR,
        linewidth=2.0,
        marker="o",
        markersize=5,
        label="held-out accuracy",
        clip_on=False,
        zorder=3,
    )
    (_, first), (_, last) = points[0], points[-1]
    _annotate(axes, points[-1], above=last >= first or len(points) == 1)
    if len(points) > 1:
        _annotate(axes, points[0], above=last < first)


def _annotate(axes: "Axes", point: Point, *, above: bool) -> None:
    inside = 0.1 < point[1] < 0.9
    above = above if inside else point[1] <= 0.1
    axes.annotate(
        f"{100 * point[1]:.1f} %",
        point,
        xytext=(0, 9 if above else -17),
        textcoords="offset points",
        ha="center",
        color=ACCURACY_COLOUR,
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        zorder=4,
    )


def _add_labels(axes: "Axes", *, title: str, num_evaluations: int) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    if num_evaluations < 2:
        note = "one held-out evaluation only" if num_evaluations else "no held-out evaluation"
        axes.set_title(note, loc="right", color="0.4", style="italic")
    axes.set_xlabel("wall-clock time since the start of the run (s)")
    axes.set_ylabel("share correct (0 to 1)")
    axes.set_ylim(0.0, 1.0)
    axes.margins(x=0.06)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
