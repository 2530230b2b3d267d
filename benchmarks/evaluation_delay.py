"""How much evaluations delay training: the quickstart with and without them, in turns.

They run every 2 updates without the limit of `evaluate.max_share`, because equal runs differ by
several percent: the delay at another share follows from `delay_per_share`. The time is that from
update 10 to the last one, without the first evaluation and the last one. The order alternates from
pair to pair. Let nothing else run.

Usage: python -m benchmarks.evaluation_delay [--pairs 3] [--every 2]
"""

import argparse

from benchmarks.harness import QUICKSTART, report, train

FIRST, UPDATES = 10, 160


def run_once(every: int) -> tuple[float, float]:
    """Seconds of training, and tokens of evaluations relative to those for training."""
    settings = {"run.updates": UPDATES, "evaluate.every": every, "evaluate.max_share": 1}
    run = train([QUICKSTART, *(f"--{name}={value}" for name, value in settings.items())])
    wall_s = {step["policy_version"]: step["wall_s"] for step in run.of_kind("step")}
    tokens = run.summary["ledger"]["tokens"]
    return wall_s[UPDATES] - wall_s[FIRST], tokens["evaluation"] / tokens["generated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--every", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for pair in range(options.pairs):
        order = (options.every, 0) if pair % 2 == 0 else (0, options.every)
        found = {every: run_once(every) for every in order}
        (with_s, share), (without_s, least) = found[options.every], found[0]
        delay, share = with_s / without_s - 1, share - least  # both have a first and a last one
        rows.append(
            {
                "with_s": with_s,
                "without_s": without_s,
                "delay": delay,
                "share": share,
                "delay_per_share": delay / share,
            }
        )
    report("evaluation_delay", "Evaluations every few updates, and none", rows)


if __name__ == "__main__":
    main()
