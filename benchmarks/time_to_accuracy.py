"""Time to a held-out accuracy of each training method, at equal completions per update.

Every arm starts from the same model, on the same prompts, with the same optimizer. First, each arm
selects its learning rate from one grid by one rule, on separate seeds. Then every arm runs with
every seed, in shuffled order, one run at a time on the whole machine. A run ends at the highest
target, or after MAX_UPDATES. Every run is one line of the results file, so that an interrupted
benchmark continues where it stopped.

    python -m benchmarks.time_to_accuracy run [--spread real] [--seeds 5] [--arms a,b]
        --only-tune: stop after selecting rates; --every-rate: run the seeds for every rate
    python -m benchmarks.time_to_accuracy report     table and figure into docs/
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness import QUICKSTART, ROOT, output_of, train
from benchmarks.spreads import SPREADS, write_prompts
from benchmarks.time_to_accuracy_report import (
    TARGETS,
    TRL_ARM,
    Job,
    Point,
    Run,
    write_report,
)

RESULTS = ROOT / "benchmarks" / "data" / "time_to_accuracy.jsonl"
NUM_PROMPTS, NUM_HELD_OUT = 2560, 384
DATA_SEED = 5
TUNING_SEEDS = (100, 101)
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
TOLERANCE = 1.2
MAX_UPDATES = 60
EVALUATE_EVERY = 5

ALTERNATING = ["--run.overlap", "false", "--cluster.actors", "2", "--learner.num_threads", "2"]
"""Without overlap, learner and actors alternate, so each uses both cores."""
POSTERIOR = ["--curriculum.kind", "posterior"]
SPEED = ["--algorithm", "speed-rloo"]

PLAIN = ["--objective.policy_loss", "policy_gradient", "--objective.correction"]

ARMS: Mapping[str, list[str]] = {
    "sync-rloo": ["--algorithm", "rloo", *ALTERNATING],
    "sync-dapo": ["--algorithm", "dapo", *ALTERNATING],
    "sync-speed": [*SPEED, *ALTERNATING],
    "async-rloo": ["--algorithm", "rloo"],
    "async-speed": SPEED,
    "async-posterior": [*SPEED, *POSTERIOR],
    TRL_ARM: ["--algorithm", "rloo"],
    "async-speed-uncorrected": [*SPEED, *PLAIN, "none"],
    "async-speed-tis": [*SPEED, *PLAIN, "token_tis"],
    "async-speed-unbiased": [*SPEED, "--objective.screening_samples", "unbiased"],
    "async-speed-none": [*SPEED, "--objective.screening_samples", "none"],
    "async-posterior-unbiased": [*SPEED, *POSTERIOR, "--objective.screening_samples", "unbiased"],
    "async-speed-recompute": [*SPEED, "--actors.running_at_update", "recompute"],
    "async-speed-stale4": [*SPEED, "--buffer.max_staleness", "4"],
    "async-speed-fifo": [*SPEED, "--buffer.signal_weight", "0", "--buffer.freshness_decay", "1"],
    "async-speed-band": [*SPEED, "--gate.high", "0.75"],
}
INHERITED_LR = {
    "async-posterior-unbiased": "async-posterior",
    **{
        f"async-speed-{part}": "async-speed"
        for part in ("unbiased", "none", "recompute", "stale4", "fifo", "band")
    },
}
"""Variants with an unchanged policy loss use the learning rate of the arm that they vary."""
VARIANTS = ("async-speed-", "async-posterior-")
TRL_SETTING = ["--threads", "2", "--micro-batch", "384"]
"""The fastest setting of benchmarks/trl.py on this machine."""

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def run_job(job: Job, prompts: Path) -> Run:
    arguments = [
        *[str(QUICKSTART), "--task.name", "jsonl", "--task.path", str(prompts)],
        *["--task.num_held_out", str(NUM_HELD_OUT), "--evaluate.every", str(EVALUATE_EVERY)],
        *["--run.updates", str(MAX_UPDATES)],
        *["--run.stop_at_accuracy", str(max(TARGETS[job.spread]))],
        *["--run.seed", str(job.seed), "--learner.lr", str(job.lr), *ARMS[job.arm]],
    ]
    start_s = time.monotonic()
    points = _trl_points(arguments) if job.arm == TRL_ARM else _our_points(arguments)
    return Run(**asdict(job), points=points, process_s=time.monotonic() - start_s)


def _our_points(arguments: Sequence[str]) -> list[Point]:
    """An evaluation belongs to the time at which its version was made. Time starts at the end of
    the first evaluation and includes later evaluations; their tokens are not counted."""
    run = train(arguments, os.environ | ENVIRONMENT)
    made = {step["policy_version"]: step for step in run.of_kind("step")}
    evaluations = run.of_kind("evaluation")
    made[0] = start = evaluations[0]
    return [
        Point(
            updates=evaluation["policy_version"],
            wall_s=made[evaluation["policy_version"]]["wall_s"] - start["wall_s"],
            tokens=_training_tokens(made[evaluation["policy_version"]]) - _training_tokens(start),
            accuracy=evaluation["accuracy"],
        )
        for evaluation in evaluations
    ]


def _training_tokens(event: Mapping[str, int]) -> int:
    return event["tokens_generated"] - event["tokens_evaluation"]


def _trl_points(arguments: Sequence[str]) -> list[Point]:
    """Time starts at the end of the first evaluation and excludes evaluations."""
    command = [sys.executable, "-m", "benchmarks.trl_arm", *arguments, *TRL_SETTING]
    output = output_of([*command, "--steps", str(MAX_UPDATES)], os.environ | ENVIRONMENT)
    results = json.loads(output.splitlines()[-1])
    ends_s, tokens = [0.0, *results["ends_s"]], [0, *results["tokens"]]
    return [
        Point(updates=int(step), wall_s=ends_s[int(step)], tokens=tokens[int(step)], accuracy=value)
        for step, value in results["accuracies"].items()
    ]


class ResultsFile:
    """The results file: finished runs and their results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [Run.from_json(json.loads(line)) for line in lines]

    def find(self, job: Job) -> Run | None:
        return next((run for run in self.runs if run.key == job.key), None)

    def run(self, job: Job, prompts: Path) -> Run:
        if (done := self.find(job)) is not None:
            return done
        run = run_job(job, prompts)
        self.runs.append(run)
        with self._path.open("a") as file:
            file.write(json.dumps(run.to_json()) + "\n")
        crossings = {target: run.reach(target) for target in TARGETS[job.spread]}
        reached = "  ".join(
            f"{target:.0%} {f'{c.updates:.0f} updates {c.wall_s:.0f} s' if c else 'never'}"
            for target, c in crossings.items()
        )
        print(
            f"{job.spread:5} {job.arm:25} lr {job.lr:.0e} seed {job.seed:3}  {reached}  "
            f"last {run.points[-1].accuracy:.3f} after {run.points[-1].updates} "
            f"({run.process_s:.0f} s)",
            flush=True,
        )
        return run


def best_lr(runs: Sequence[Run]) -> float:
    """Select a learning rate by a fixed rule: the smallest rate within TOLERANCE of the fewest
    updates (mean over the tuning seeds) to the highest target that any of the arm's rates reached
    with every seed. If no rate reached a target, the best mean of the last accuracies. The smallest
    rate, because near the edge of stability a larger one is slightly faster until it diverges."""
    by_lr: dict[float, list[Run]] = {}
    for run in runs:
        by_lr.setdefault(run.lr, []).append(run)
    for target in sorted(TARGETS[runs[0].spread], reverse=True):
        reached = {lr: [run.reach(target) for run in lr_runs] for lr, lr_runs in by_lr.items()}
        updates = {
            lr: statistics.fmean(crossing.updates for crossing in crossings if crossing)
            for lr, crossings in reached.items()
            if all(crossings)
        }
        if updates:
            fewest = min(updates.values())
            return min(lr for lr, mean in updates.items() if mean <= TOLERANCE * fewest)
    return max(by_lr, key=lambda lr: statistics.fmean(run.points[-1].accuracy for run in by_lr[lr]))


def chosen_lr(spread: str, arm: str, runs: Sequence[Run]) -> float:
    """The rate that `best_lr` selects for an arm from its tuning runs."""
    tuned_arm = INHERITED_LR.get(arm, arm)
    tuning = [
        run
        for run in runs
        if run.seed in TUNING_SEEDS and (run.spread, run.arm) == (spread, tuned_arm)
    ]
    return best_lr(tuning)


def run_all(
    spread: str,
    arms: Sequence[str],
    num_seeds: int,
    *,
    only_tune: bool,
    every_rate: bool,
    results: ResultsFile,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / f"{spread}.jsonl"
        shares = write_prompts(
            prompts,
            model_folder=QUICKSTART.parent / "model",
            spread=SPREADS[spread],
            num_prompts=NUM_PROMPTS + NUM_HELD_OUT,
            seed=DATA_SEED,
        )
        print(f"{spread}: {shares}", flush=True)
        for arm in dict.fromkeys(INHERITED_LR.get(arm, arm) for arm in arms):
            for lr in LEARNING_RATES:
                for seed in TUNING_SEEDS:
                    results.run(Job(spread=spread, arm=arm, lr=lr, seed=seed), prompts)
            print(f"{arm}: lr {chosen_lr(spread, arm, results.runs):.0e}", flush=True)
        if only_tune:
            return
        for seed in range(num_seeds):
            for arm in random.Random(seed).sample(list(arms), len(arms)):
                chosen = chosen_lr(spread, arm, results.runs)
                for lr in LEARNING_RATES if every_rate else (chosen,):
                    results.run(Job(spread=spread, arm=arm, lr=lr, seed=seed), prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--spread", choices=list(SPREADS), default="real")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--only-tune", action="store_true")
    parser.add_argument("--every-rate", action="store_true", help="not only the selected one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = ResultsFile(options.results)
    if options.what == "run":
        arms = options.arms.split(",")
        run_all(
            options.spread,
            arms,
            options.seeds,
            only_tune=options.only_tune,
            every_rate=options.every_rate,
            results=results,
        )
    else:
        final_runs = [run for run in results.runs if run.seed not in TUNING_SEEDS]
        chosen = {
            (spread, arm): chosen_lr(spread, arm, results.runs)
            for spread, arm in {(run.spread, run.arm) for run in final_runs}
        }
        variants = [arm for arm in ARMS if arm.startswith(VARIANTS)]
        arms = [arm for arm in ARMS if arm not in variants]
        write_report(final_runs, chosen, arms, variants, ROOT / "docs")


if __name__ == "__main__":
    main()
