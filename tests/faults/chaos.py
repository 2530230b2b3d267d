"""The long form of fault injection: faults by kind, recovery times, and losses.

    python -m tests.faults.chaos [--faults 500] [--seed N] [--faults-a-run 50] [--kinds A,B]

Real runs (processes, ZeroMQ through a proxy, gloo, a journal on a small disk) with the scripted
engine. Faults occur at random times drawn from a seed. Stops at the first violated invariant with
status 1 and the findings.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.drill import run_drills
from tests.faults.faults import KINDS, plan
from tests.faults.results import Result, medians, service_growth
from tests.faults.settings import Plan
from tests.faults.started_run import DrillFailed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--faults-a-run", type=int, default=50)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    arguments = parser.parse_args()
    log(f"seed {arguments.seed}")
    faults = plan(arguments.seed, arguments.faults, arguments.kinds.split(","))
    drill = Plan(faults=faults, seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="speed_async-chaos-") as folder:
        try:
            results = run_drills(Path(folder), drill, arguments.faults_a_run, log)
        except DrillFailed as failed:
            log(f"seed {arguments.seed}: {failed}")
            return 1
    log(report(results, arguments.seed))
    return 0


def log(text: str) -> None:
    print(text, flush=True)


def report(results: list[Result], seed: int) -> str:
    """The figures of all runs, in Markdown."""
    rounds = [each for result in results for each in result.rounds]
    totals = {
        key: sum(result.verdict.numbers[key] for result in results)
        for key in results[0].verdict.numbers
    }
    growth = max(service_growth(result.rounds) for result in results)
    lines = [
        f"seed {seed}: {len(rounds)} faults in {len(results)} runs, "
        f"{sum(result.seconds for result in results):,.0f} s",
        f"faults without a target, not injected: {sum(len(result.skipped) for result in results)}",
        *(f"{key.replace('_', ' ')}: {value:,}" for key, value in totals.items()),
        "accepted groups lost: 0; trained twice: 0; unbalanced ledgers: 0",
        f"service memory, last third of a run over its first third, maximum: {growth:.3f}",
    ]
    table = ["| fault | times | median s | longest s |", "| --- | --- | --- | --- |"]
    table += [
        f"| {kind} | {times} | {median:.1f} | {longest:.1f} |"
        for kind, (times, median, longest) in medians(rounds).items()
    ]
    return "\n".join([*table, "", *(f"- {line}" for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
