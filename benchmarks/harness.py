"""Shared by all benchmarks: other programs, runs, and results as a table and as JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "quickstart" / "config.toml"
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT_S = 900.0


def output_of(command: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """Run another program and return its stdout. RuntimeError with the tail of its stderr."""
    texts = list(map(str, command))
    completed = subprocess.run(
        texts, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if completed.returncode:
        raise RuntimeError(f"{' '.join(texts)} failed:\n{completed.stderr[-2000:]}")
    return completed.stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    """The lines of metrics.jsonl."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def train(
    arguments: Sequence[str | Path], environment: Mapping[str, str] = os.environ
) -> TrainingRun:
    """Run `speed-async train ARGUMENTS` with a run folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        command = [sys.executable, "-m", "speed_async", "train", *arguments]
        output_of([*command, "--run.folder", folder], environment)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((folder / "summary.json").read_text())
    return TrainingRun(summary=summary, events=[json.loads(line) for line in lines])


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each value over the runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def report(name: str, title: str, rows: list[dict[str, object]]) -> None:
    """Print `rows` (all with the same keys) and write them to results/NAME.json."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": _machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _machine() -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
