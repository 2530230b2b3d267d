"""Run the service at full rate for an hour and check that its memory stays constant.

One actor sends groups as fast as they are acknowledged. A learner takes batches and reports a
durable checkpoint after every 20. The journal is written (batched). The service's resident memory
is sampled every second. After the warm-up, the mean of the last tenth of the samples is compared
with that of the first tenth: the memory is flat if they differ by at most 1 %.

Usage: python -m benchmarks.soak [--minutes 60] [--warm-up 5] [--tokens 1024] [--durability batched]
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import psutil

from benchmarks.harness import (
    GROUP_SIZE,
    SPAWN,
    report,
    running_processes,
    service,
    service_config,
)
from benchmarks.service_peers import run_actor, run_learner

SAMPLE_S = 1.0
MAX_GROWTH = 0.01


def growth(samples: Sequence[float]) -> float:
    """Relative growth of the last tenth over the first tenth."""
    tenth = max(1, len(samples) // 10)
    first, last = np.mean(samples[:tenth]), np.mean(samples[-tenth:])
    return float(last / first - 1)


def soak(minutes: float, warm_up_minutes: float, tokens: int, durability: str) -> dict[str, object]:
    num_groups = SPAWN.Value("Q", 0)
    resident: list[float] = []
    journal_bytes: list[float] = []
    with service(service_config(durability=durability)) as running:
        learner = (run_learner, (running.port, num_groups, None, durability != "none"))
        with running_processes(learner, (run_actor, (running.port, tokens, None))):
            service_process = psutil.Process(running.process_id)
            time.sleep(60 * warm_up_minutes)
            start_s, before = time.monotonic(), num_groups.value
            while time.monotonic() < start_s + 60 * minutes:
                time.sleep(SAMPLE_S)
                resident.append(service_process.memory_info().rss)
                files = (running.run_folder / "journal").glob("*")
                journal_bytes.append(sum(file.stat().st_size for file in files if file.is_file()))
                if len(resident) % 60 == 0:
                    print(f"{len(resident)} s: {resident[-1] / 1e6:.1f} MB", flush=True)
            num_moved, took_s = num_groups.value - before, time.monotonic() - start_s
    if not num_moved:
        raise RuntimeError("no group arrived")
    return {
        "minutes": minutes,
        "journal": durability,
        "groups": num_moved,
        "groups_per_s": num_moved / took_s,
        "mb_per_s": 12e-6 * tokens * GROUP_SIZE * num_moved / took_s,
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
