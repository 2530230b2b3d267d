"""Fault drills at length: what is broken how often, how soon a run is whole again, what is lost.

Real runs (processes, ZeroMQ through a proxy, gloo, a journal on a small disk) with the scripted
engine; faults at random instants from a seed; tests/chaos says how each is made, and who decides.
Ends at the first broken promise, with status 1 and the words of the witness.

Usage: python -m benchmarks.chaos [--faults 500] [--seed N] [--faults-a-run 50]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, report

sys.path.insert(0, str(ROOT / "tests"))

from chaos.drill import run_drills
from chaos.faults import KINDS, plan
from chaos.results import Result, medians, service_growth
from chaos.settings import Plan
from chaos.started_run import DrillFailed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--faults-a-run", type=int, default=50)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    arguments = parser.parse_args()
    say(f"seed {arguments.seed}")
    faults = plan(arguments.seed, arguments.faults, arguments.kinds.split(","))
    drill = Plan(faults=faults, seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="speed_async-chaos-") as folder:
        try:
            results = run_drills(Path(folder), drill, arguments.faults_a_run, say)
        except DrillFailed as failed:
            say(f"seed {arguments.seed}: {failed}")
            return 1
    tell(results, arguments.seed)
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def tell(results: list[Result], seed: int) -> None:
    rounds = [each for result in results for each in result.rounds]
    rows: list[dict[str, object]] = [
        {"fault": kind, "times": times, "median_recovery_s": median, "longest_s": longest}
        for kind, (times, median, longest) in medians(rounds).items()
    ]
    report("chaos", f"Faults and recoveries, seed {seed}", rows)
    totals = {
        key: sum(result.verdict.numbers[key] for result in results)
        for key in results[0].verdict.numbers
    }
    growth = max(service_growth(result.rounds) for result in results)
    lines = [
        f"{len(rounds)} faults in {len(results)} runs, {sum(r.seconds for r in results):,.0f} s",
        f"not made for want of a target: {sum(len(result.skipped) for result in results)}",
        *(f"{key.replace('_', ' ')}: {value:,}" for key, value in totals.items()),
        "accepted groups lost: 0; trained twice: 0; ledgers that did not close: 0",
        f"service's memory, last third of a run over its first, at most: {growth:.3f}",
    ]
    table = ["| fault | times | median s | longest s |", "| --- | --- | --- | --- |"]
    table += [
        f"| {kind} | {times} | {median:.1f} | {longest:.1f} |"
        for kind, (times, median, longest) in medians(rounds).items()
    ]
    text = "\n".join([*table, "", *(f"- {line}" for line in lines)]) + "\n"
    (RESULTS / "chaos.md").write_text(text)
    say(text)


if __name__ == "__main__":
    sys.exit(main())
