"""Compare a complete training loop with TRL's RLOOTrainer, in completions per second.

The sides alternate, each in its own processes, and may use both cores. Start-up and the first
updates of every run are excluded.

Usage: python -m benchmarks.trl [--repeats N] [--trl-steps N] [--updates N] [--section.field value]
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.harness import QUICKSTART, output_of, report, train
from speed_async.config.load import load_config
from speed_async.config.schema import Config

NUM_SKIPPED_UPDATES = 2
"""Updates at the start of each run that are not measured."""
TUNING_STEPS = 5
TRL_THREADS = (1, 2)
TRL_MICRO_BATCHES = (384, 192, 96, 48)

EQUAL = """\
equal    model (fp32, CPU), training prompts, reward (exact match), completions per update, group
         size, temperature 1, maximum completion length, learning rate and warm-up, gradient clip,
         AdamW, one gradient step per batch, no KL term; both may use every core
TRL      new uniform prompts; every completion is trained, including groups without spread, which
         give no gradient; one model.generate of the whole batch, then {micro_batch} completions
         per forward and backward pass, {threads} torch thread(s): the fastest of {num_tried}
         settings; beta 0, no gradient checkpointing, no evaluation, no logs
ours     as run by `speed-async train`: also screens prompts and drops those always or never
         solved (all trained groups have spread), evaluates {num_held_out} held-out prompts
         every {every} updates, broadcasts weights, keeps the ledger, checks staleness;
         "generated" includes screened-out and evaluation completions
measured from the end of update {left_out} to the last one's; ratios are of adjacent runs"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates per second in the steady state of one run."""

    trained: float
    generated: float
    updates: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrlSetting:
    threads: int
    micro_batch: int


def run_trl(config: Config, setting: TrlSetting, num_steps: int, arguments: list[str]) -> Rates:
    command = [sys.executable, "-m", "benchmarks.trl_arm", *arguments]
    command += ["--threads", str(setting.threads), "--micro-batch", str(setting.micro_batch)]
    command += ["--steps", str(num_steps), "--evaluate.every", "0"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(setting.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    ends_s = json.loads(output_of(command, environment).splitlines()[-1])["ends_s"]
    updates = (len(ends_s) - NUM_SKIPPED_UPDATES) / (ends_s[-1] - ends_s[NUM_SKIPPED_UPDATES - 1])
    completions = updates * config.learner.groups_per_update * config.gate.group_size
    return Rates(trained=completions, generated=completions, updates=updates)


def run_ours(num_updates: int, arguments: list[str]) -> Rates:
    """Run as a user does, except for the folder and the length."""
    environment = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"}
    run = train([*arguments, "--run.updates", str(num_updates)], environment)
    summary, steps = run.summary, run.of_kind("step")
    first, last = steps[NUM_SKIPPED_UPDATES - 1], steps[-1]
    elapsed_s = last["wall_s"] - first["wall_s"]
    tokens_per_completion = summary["tokens_generated"] / summary["completions_generated"]
    num_tokens = last["tokens_generated"] - first["tokens_generated"]
    return Rates(
        trained=(last["completions_trained"] - first["completions_trained"]) / elapsed_s,
        generated=num_tokens / tokens_per_completion / elapsed_s,
        updates=(last["policy_version"] - first["policy_version"]) / elapsed_s,
    )


def fastest_trl(config: Config, arguments: list[str]) -> TrlSetting:
    num_completions = config.learner.groups_per_update * config.gate.group_size
    tried: dict[TrlSetting, float] = {}
    for threads, micro_batch in product(TRL_THREADS, TRL_MICRO_BATCHES):
        if num_completions % micro_batch == 0:
            setting = TrlSetting(threads=threads, micro_batch=micro_batch)
            tried[setting] = run_trl(config, setting, TUNING_STEPS, arguments).trained
            print(f"TRL with {setting}: {tried[setting]:,.0f} completions/s", flush=True)
    return max(tried, key=lambda setting: tried[setting])


def row_of(side: str, rates: Sequence[Rates], trl: Sequence[Rates]) -> dict[str, object]:
    pairs = list(zip(rates, trl, strict=True))
    return {
        "side": side,
        "trained_completions_per_s": statistics.median(r.trained for r in rates),
        "generated_completions_per_s": statistics.median(r.generated for r in rates),
        "updates_per_s": statistics.median(r.updates for r in rates),
        "trained_over_trl": statistics.median(r.trained / base.trained for r, base in pairs),
        "lowest": min(r.trained / base.trained for r, base in pairs),
        "generated_over_trl": statistics.median(r.generated / base.generated for r, base in pairs),
        "runs": len(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-steps", type=int, default=12)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--config", default=str(QUICKSTART))
    options, overrides = parser.parse_known_args()
    arguments = [options.config, *overrides]
    config = load_config(options.config, overrides)
    setting = fastest_trl(config, arguments)
    trl: list[Rates] = []
    ours: list[Rates] = []
    for _ in range(options.repeats):
        trl.append(run_trl(config, setting, options.trl_steps, arguments))
        ours.append(run_ours(options.updates, arguments))
        print(f"TRL {trl[-1]}\nours {ours[-1]}", flush=True)
    notes = EQUAL.format(
        micro_batch=setting.micro_batch,
        threads=setting.threads,
        num_tried=len(TRL_THREADS) * len(TRL_MICRO_BATCHES),
        num_held_out=config.task.num_held_out,
        every=config.evaluate.every,
        left_out=NUM_SKIPPED_UPDATES,
    )
    title = (
        "Completions/s of a complete loop: TRL 1.16.0 RLOOTrainer and speed_async, quickstart "
        f"model, {config.learner.groups_per_update} x {config.gate.group_size} completions per "
        "update"
    )
    report("trl", f"{title}\n{notes}", [row_of("TRL", trl, trl), row_of("speed_async", ours, trl)])


if __name__ == "__main__":
    main()
