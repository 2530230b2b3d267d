"""100,000 groups in the priority buffer: time per operation, and bytes per group.

The groups are on disk (`message` is None), so that only the buffer's own memory is counted. Their
versions and pass rates are those of a run: groups of 24, four versions in the buffer. Times are
processor times. Bytes are the resident size of the process over the maximum number of groups, and
therefore include allocator overhead and what removed groups leave behind. The longest call may
include making the heaps anew.

Usage: python -m benchmarks.priority_buffer
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Iterator

import psutil

from benchmarks.harness import report
from speed_async.buffer.priority import BufferedGroup, PriorityBuffer

NUM_GROUPS = 100_000
GROUP_SIZE = 24
GROUPS_A_BATCH = 16
NUM_STEADY = 100_000
"""Number of insertions and takes while the buffer stays full."""


def make_groups(num_groups: int, first_lease: int, version: int) -> Iterator[BufferedGroup]:
    rng = random.Random(first_lease)
    for lease_id in range(first_lease, first_lease + num_groups):
        tokens = rng.randrange(2_000, 200_000)
        yield BufferedGroup(
            message=None,
            lease_id=lease_id,
            pass_rate=rng.randrange(GROUP_SIZE + 1) / GROUP_SIZE,
            oldest_version=version + rng.randrange(4),
            mean_version=version + rng.random(),
            num_tokens=tokens,
            num_bytes=12 * tokens,
            place=(lease_id // 1000, 12 * tokens * (lease_id % 1000)),
        )


def timed(calls: Iterator[Callable[[], object]], groups_each: int = 1) -> tuple[float, float]:
    """Mean microseconds per group, and the longest call in milliseconds. The time to create the
    calls is not included."""
    total_s, longest_s, num_calls = 0.0, 0.0, 0
    for call in calls:
        start_s = time.process_time()
        call()
        took_s = time.process_time() - start_s
        total_s += took_s
        longest_s = max(longest_s, took_s)
        num_calls += 1
    return 1e6 * total_s / (num_calls * groups_each), 1e3 * longest_s


def inserts(buffer: PriorityBuffer, groups: Iterator[BufferedGroup]) -> Iterator[Callable]:
    for group in groups:
        yield lambda group=group: buffer.insert(group)


def takes(buffer: PriorityBuffer, num_takes: int) -> Iterator[Callable]:
    for _ in range(num_takes):
        yield lambda: buffer.take(GROUPS_A_BATCH)


def measure(num_groups: int, num_steady: int, *, by_signal: bool) -> list[dict[str, object]]:
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    buffer = PriorityBuffer(capacity_groups=num_groups, capacity_bytes=1 << 62, by_signal=by_signal)
    rows: list[dict[str, object]] = []

    def add_row(what: str, times: tuple[float, float]) -> None:
        gc.collect()
        rows.append(
            {
                "order": "signal" if by_signal else "arrival",
                "what": what,
                "groups_held": len(buffer),
                "us_a_group": times[0],
                "longest_call_ms": times[1],
                "bytes_a_group": (process.memory_info().rss - before) / num_groups,
            }
        )

    add_row("insert", timed(inserts(buffer, make_groups(num_groups, 0, 0))))
    fresh = make_groups(num_steady, num_groups, 1)
    add_row("insert, evict the worst", timed(inserts(buffer, fresh)))
    num_takes = num_steady // GROUPS_A_BATCH
    add_row("take", timed(takes(buffer, num_takes), GROUPS_A_BATCH))
    add_row("insert again", timed(inserts(buffer, make_groups(num_steady, 2 * num_groups, 1))))
    num_old = len(buffer)
    times = timed(iter([lambda: buffer.drop_older_than(2)]))
    num_old -= len(buffer)
    add_row(f"drop {num_old:,} stale", (1e3 * times[1] / max(num_old, 1), times[1]))
    left = len(buffer) // GROUPS_A_BATCH
    add_row("take all", timed(takes(buffer, left), GROUPS_A_BATCH))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=NUM_GROUPS)
    arguments = parser.parse_args()
    steady = min(NUM_STEADY, arguments.groups)
    rows = measure(arguments.groups, steady, by_signal=True)
    rows += measure(arguments.groups, steady, by_signal=False)
    report("priority_buffer", f"Priority buffer of {arguments.groups:,} groups", rows)


if __name__ == "__main__":
    main()
