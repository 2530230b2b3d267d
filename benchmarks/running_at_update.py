"""Handling of running sequences at an update: keep their KV cache, or recompute it.

Runs the quickstart with either choice, on either engine, and compares speed, pause, and how far
off-policy the trained tokens are. Medians over seeds. The last columns are means over the updates
of a run.

Usage: python -m benchmarks.running_at_update [--seeds N] [--engines torch,vllm]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import QUICKSTART, output_of, report

UPDATES = 40
CHOICES = ("keep", "recompute")
MEASURES = ("kl_k3", "effective_sample_size", "clipped_share")


def run_once(engine: str, choice: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        overrides = {
            "run.folder": str(folder),
            "run.seed": str(seed),
            "run.updates": str(UPDATES),
            "actors.engine": engine,
            "actors.running_at_update": choice,
            "evaluate.every": "0",
        }
        options = [option for name, value in overrides.items() for option in (f"--{name}", value)]
        output_of(
            [sys.executable, "-m", "speed_async", "train", str(QUICKSTART), *options],
            os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    walls_s = [step["wall_s"] for step in steps]
    tokens = summary["ledger"]["tokens"]
    return {
        "tokens_per_s": summary["tokens_per_s"],
        "s_per_update": (walls_s[-1] - walls_s[0]) / (len(walls_s) - 1),
        "pause_ms": 1000 * summary["weights"]["pause_s"],
        "transfer_ms": 1000 * summary["weights"]["transfer_s"],
        "stale_share": tokens["stale"] / tokens["generated"],
        **{name: statistics.fmean(step[name] for step in steps) for name in MEASURES},
        "accuracy_after": summary["accuracy_after"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engines", default="torch,vllm")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for engine in arguments.engines.split(","):
        runs: dict[str, list[dict[str, float]]] = {choice: [] for choice in CHOICES}
        for seed in range(arguments.seeds):
            for choice in CHOICES if seed % 2 == 0 else reversed(CHOICES):
                runs[choice].append(run_once(engine, choice, seed))
        for choice, choice_runs in runs.items():
            medians = {
                name: statistics.median(run[name] for run in choice_runs) for name in choice_runs[0]
            }
            rows.append({"engine": engine, "choice": choice, **medians})
    report(
        "running_at_update",
        f"Running sequences at an update, quickstart, {UPDATES} updates, medians of "
        f"{arguments.seeds} seeds",
        rows,
    )


if __name__ == "__main__":
    main()
