"""One update of the learner against TRL's step and a plain Hugging Face loop: speed and memory.

Each arm is a process of its own with the same random model and groups: prompts of 64 to 256 tokens,
completions with long-tailed lengths of 64 to 2,048. TRL's RLOOTrainer takes the given completions
instead of generating. The gradient norms of ours and of the plain loop are compared. The other
sides' micro-batches are the fastest of a few, and are stated.

Usage: python -m benchmarks.learner [--size 30M|135M] [--groups N] [--group-size N] [--repeats N]
TRL needs `pip install -e '.[bench]'`.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
from typing import Any

from benchmarks.harness import output_of, report

MICRO_BATCHES = (1, 2, 4, 8)
"""Completions per forward and backward pass."""


def measure(arm: str, options: argparse.Namespace, micro_batch: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.learner_arm", "--arm", arm]
    for name in ("size", "groups", "group_size", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--micro-batch", str(micro_batch)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return json.loads(output_of(command, environment).splitlines()[-1])


def row(name: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, object]:
    def median_ratio(field: str) -> float:
        return statistics.median(r[field] / o[field] for r, o in zip(runs, ours, strict=True))

    return {
        "arm": name,
        "tokens_per_s": statistics.median(each["tokens"] / each["wall_s"] for each in runs),
        "time_to_ours": median_ratio("wall_s"),
        "peak_mib": statistics.median(each["peak_mib"] for each in runs),
        "peak_to_ours": median_ratio("peak_mib"),
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
    parser.add_argument("--micro-batches", type=int, nargs="*", default=MICRO_BATCHES)
    options = parser.parse_args()
    others = ["hugging-face", *(["trl"] if importlib.util.find_spec("trl") else [])]
    fastest: dict[str, int] = {}
    for arm in others:
        tried = {size: measure(arm, options, size) for size in options.micro_batches}
        fastest[arm] = min(tried, key=lambda size: tried[size]["wall_s"])
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{arm: [] for arm in others}}
    for repeat in range(options.repeats):
        for arm in runs if repeat % 2 == 0 else reversed(runs):
            runs[arm].append(measure(arm, options, fastest.get(arm, 0)))
        norms = [runs[arm][-1]["grad_norm"] for arm in ("ours", "hugging-face")]
        if not math.isclose(*norms, rel_tol=1e-3):
            raise RuntimeError(f"the gradients differ: {norms}")
    rows = [
        row(arm if arm == "ours" else f"{arm}, {fastest[arm]} at a time", each, runs["ours"])
        for arm, each in runs.items()
    ]
    num_tokens = runs["ours"][0]["tokens"]
    report("learner", f"One update of {num_tokens} tokens, {options.size} parameters", rows)


if __name__ == "__main__":
    main()
