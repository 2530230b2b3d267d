"""An hour of the service at full rate: does its memory stay flat?

One actor sends groups as fast as they are acknowledged, a learner takes batches and calls a
checkpoint durable after every 20; the journal is written (batched). The service's resident memory
is sampled each second. After the warm-up, the mean of the last tenth of the samples is compared
with that of the first tenth: flat means that they differ by no more than 1 %.

Usage: python -m benchmarks.soak [--minutes 60] [--warm-up 5] [--tokens 1024] [--durability batched]
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import psutil

from benchmarks.harness import report
from benchmarks.service import CREDITS, SPAWN, act, learn, started
from benchmarks.service_harness import service, service_config
from benchmarks.service_roles import GROUP_SIZE

SAMPLE_S = 1.0
MAX_GROWTH = 0.01


def growth(samples: Sequence[float]) -> float:
    """Of the last tenth over the first tenth, as a share of the first."""
    tenth = max(1, len(samples) // 10)
    first, last = np.mean(samples[:tenth]), np.mean(samples[-tenth:])
    return float(last / first - 1)


def soak(minutes: float, warm_up_minutes: float, tokens: int, durability: str) -> dict[str, object]:
    num_groups = SPAWN.Value("Q", 0)
    resident: list[float] = []
    journal_bytes: list[float] = []
    with service(service_config(durability=durability, credits=CREDITS)) as running:
        learning = (learn, (running.port, num_groups, None, durability != "none"))
        with started(learning, (act, (running.port, tokens, None))):
            of_service = psutil.Process(running.process.pid)
            time.sleep(60 * warm_up_minutes)
            began_s, before = time.monotonic(), num_groups.value
            while time.monotonic() < began_s + 60 * minutes:
                time.sleep(SAMPLE_S)
                resident.append(of_service.memory_info().rss)
                files = (running.run_folder / "journal").glob("*")
                journal_bytes.append(sum(file.stat().st_size for file in files if file.is_file()))
                if len(resident) % 60 == 0:
                    print(f"{len(resident)} s: {resident[-1] / 1e6:.1f} MB", flush=True)
            moved, took_s = num_groups.value - before, time.monotonic() - began_s
    if not moved:
        raise RuntimeError("nothing moved")
    return {
        "minutes": minutes,
        "journal": durability,
        "groups": moved,
        "groups_per_s": moved / took_s,
        "mb_per_s": 12e-6 * tokens * GROUP_SIZE * moved / took_s,
        "resident_first_mb": resident[0] / 1e6,
        "resident_max_mb": max(resident) / 1e6,
        "resident_last_mb": resident[-1] / 1e6,
        "journal_max_mb": max(journal_bytes) / 1e6,
        "growth": f"{100 * growth(resident):+.2f} %",
        "flat": abs(growth(resident)) <= MAX_GROWTH,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--durability", default="batched")
    arguments = parser.parse_args()
    row = soak(arguments.minutes, arguments.warm_up, arguments.tokens, arguments.durability)
    title = f"The service at full rate, groups of {GROUP_SIZE} of {arguments.tokens} tokens"
    report("soak", title, [row])
    return 0 if row["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
