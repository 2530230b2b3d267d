"""The experiment behind docs/time_to_accuracy.md: which arm needs fewer tokens, core-seconds and
seconds to an accuracy. Everything is fixed in plan.py before the runs.

    python -m benchmarks.evidence run --spread real --minutes 30    makes the next runs
    python -m benchmarks.evidence status                            what is made and what is left
    python -m benchmarks.evidence report                            tables and figure, from the data

`run` appends a line to benchmarks/data/evidence.jsonl after each run and can be ended at any time;
the next session continues. `--idle` makes the evaluation runs again that were made on a machine
with other work, for the endpoints in seconds. The arm of TRL needs `pip install -e '.[bench]'`.
"""

import argparse
import statistics
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from benchmarks.evidence.experiment import Experiment
from benchmarks.evidence.plan import EXPERIMENT, SPREADS
from benchmarks.evidence.records import Record, append, only_writer, read_records
from benchmarks.evidence.report import write_report
from benchmarks.evidence.schedule import pending_jobs
from benchmarks.evidence.training import RunFailed
from benchmarks.harness import ROOT

DATA = ROOT / "benchmarks" / "data" / "evidence.jsonl"
DOCS = ROOT / "docs"


def run(
    path: Path, spread: str, arms: list[str], *, minutes: float, max_runs: int, idle: bool
) -> None:
    """Makes runs until the time is over. The last one may take longer."""
    end_s = time.monotonic() + 60 * minutes
    experiment = Experiment(spread)
    failed: set[tuple[object, ...]] = set()
    with only_writer(path):
        for _ in range(max_runs):
            records = read_records(path, EXPERIMENT)
            jobs = pending_jobs(spread, arms, records, idle=idle)
            jobs = [job for job in jobs if job.key not in failed]
            if not jobs or time.monotonic() > end_s:
                break
            try:
                record = experiment.run(jobs[0])
            except RunFailed as error:  # left for a later session
                failed.add(jobs[0].key)
                print(f"failed: {jobs[0]}: {error}", flush=True)
                continue
            append(path, record)
            print(_line(record, len(jobs)), flush=True)


def _line(record: Record, num_jobs: int) -> str:
    plan = SPREADS[record.spread]
    tokens = [record.cost("tokens", target, plan.horizon_tokens) for target in plan.targets]
    reached = " ".join(f"{each:,.0f}" for each in tokens)
    setting = record.setting
    return (
        f"{record.spread} {record.arm} lr {setting.lr:.0e} clip {setting.clip:.2f} "
        f"shape {setting.shape} seed {record.seed}: tokens {reached}, last "
        f"{record.points[-1].accuracy:.3f}, {record.ended}, {sum(record.role_core_s.values()):.0f} "
        f"core-s in {record.process_s:.0f} s, {num_jobs - 1} more known"
    )


def status(path: Path) -> None:
    records = read_records(path, EXPERIMENT)
    for spread, plan in SPREADS.items():
        own = [record for record in records if record.spread == spread]
        idle = sum(record.is_idle for record in own)
        print(f"{spread}: {len(own)} runs, {idle} of them on an idle machine")
        for arm in plan.arms:
            runs = [record for record in own if record.arm == arm]
            if not runs:
                continue
            core_s = statistics.fmean(sum(record.role_core_s.values()) for record in runs)
            print(f"  {arm:28} {len(runs):4} runs, {core_s:.0f} core-seconds each")
        jobs = pending_jobs(spread, plan.arms, records)
        kind = "" if not jobs else f", first: {jobs[0].arm} seed {jobs[0].seed}"
        print(f"  {len(jobs)} runs can be made now{kind}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "status", "report"])
    parser.add_argument("--spread", choices=list(SPREADS), default="real")
    parser.add_argument("--arms", help="comma-separated; all arms of the spread without it")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--max-runs", type=int, default=10_000)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    disable_progress_bar()
    if options.what == "status":
        status(options.data)
    elif options.what == "report":
        write_report(read_records(options.data, EXPERIMENT), DOCS)
    else:
        arms = options.arms.split(",") if options.arms else list(SPREADS[options.spread].arms)
        known = SPREADS[options.spread].arms
        if unknown := [arm for arm in arms if arm not in known]:
            parser.error(f"--arms {unknown}: the arms of {options.spread} are {known}")
        run(
            options.data,
            options.spread,
            arms,
            minutes=options.minutes,
            max_runs=options.max_runs,
            idle=options.idle,
        )


if __name__ == "__main__":
    main()
