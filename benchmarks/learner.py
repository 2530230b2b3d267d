"""One update of the learner against a plain Hugging Face loop: trained tokens per second, memory.

Each arm is a process of its own with the same random model and groups: prompts of 64 to 256 tokens,
completions with long-tailed lengths of 64 to 2,048. The gradient norms are compared first. The
other side's micro-batch is the fastest of a few.

Usage: python -m benchmarks.learner [--size 30M|135M] [--groups N] [--group-size N] [--repeats N]
"""

import argparse
import json
import math
import os
import statistics
import sys
from typing import Any

from benchmarks.harness import output_of, report

MICRO_BATCHES = (1, 2, 4)
"""Completions per forward and backward pass."""


def measure(arm: str, options: argparse.Namespace, micro_batch: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.learner_arm", "--arm", arm]
    for name in ("size", "groups", "group_size", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--micro-batch", str(micro_batch)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return json.loads(output_of(command, environment).splitlines()[-1])


def row(arm: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, object]:
    def median_ratio(name: str) -> float:
        return statistics.median(b[name] / r[name] for r, b in zip(runs, base, strict=True))

    return {
        "arm": arm,
        "tokens_per_s": statistics.median(each["tokens"] / each["wall_s"] for each in runs),
        "ratio": median_ratio("wall_s"),
        "peak_mib": statistics.median(each["peak_mib"] for each in runs),
        "update_mib": statistics.median(each["update_mib"] for each in runs),
        "memory_ratio": 1 / median_ratio("update_mib"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["30M", "135M"], default="30M")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    tried = {size: measure("hugging-face", options, size) for size in MICRO_BATCHES}
    fastest = min(tried, key=lambda size: tried[size]["wall_s"])
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        arms = [(ours, "ours", 0), (theirs, "hugging-face", fastest)]
        for runs, arm, micro_batch in arms if repeat % 2 == 0 else reversed(arms):
            runs.append(measure(arm, options, micro_batch))
        if not math.isclose(ours[-1]["grad_norm"], theirs[-1]["grad_norm"], rel_tol=1e-3):
            raise RuntimeError(f"other gradients: {ours[-1]}, {theirs[-1]}")
    rows = [
        row("ours", ours, theirs),
        row(f"Hugging Face, {fastest} completions at a time", theirs, theirs),
    ]
    title = f"One update of {ours[0]['tokens']} completion tokens, {options.size} parameters"
    report("learner", title, rows)


if __name__ == "__main__":
    main()
