"""Handling of running sequences at an update: keep their KV cache, or recompute it.

Runs the quickstart with either choice, on either engine, and compares speed, pause, and how far
off-policy the trained tokens are. Medians over seeds. The last columns are means over the updates
of a run.

Usage: python -m benchmarks.running_at_update [--seeds N] [--engines torch,vllm]
"""

import argparse
import statistics

from benchmarks.harness import QUICKSTART, medians, report, train

UPDATES = 40
CHOICES = ("keep", "recompute")
MEASURES = ("kl_k3", "effective_sample_size", "clipped_share")


def run_once(engine: str, choice: str, seed: int) -> dict[str, float]:
    options = ["--run.seed", str(seed), "--run.updates", str(UPDATES), "--evaluate.every", "0"]
    options += ["--actors.engine", engine, "--actors.running_at_update", choice]
    run = train([QUICKSTART, *options])
    summary, steps = run.summary, run.of_kind("step")
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
            rows.append({"engine": engine, "choice": choice, **medians(choice_runs)})
    report(
        "running_at_update",
        f"Running sequences at an update, quickstart, {UPDATES} updates, medians of "
        f"{arguments.seeds} seeds",
        rows,
    )


if __name__ == "__main__":
    main()
