"""Shared by all benchmarks: a rich table on the terminal, and the same rows as JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

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
