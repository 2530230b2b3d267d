"""How an update scales over learner ranks on one machine: speed, and memory of each rank.

Every rank is a process with one thread; parameters are sharded and gradients reduced over gloo. All
numbers of ranks train the same random model on the same groups (learner_arm.py), in turns.

Usage: python -m benchmarks.learner_ranks [--size 30M|135M] [--ranks 1 2] [--repeats N]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from benchmarks.harness import MODEL_SHAPES, ROOT, TIMEOUT_S, report
from benchmarks.learner_arm import Meter, make_config, random_groups, save_random_llama
from speed_async.learner.parallel.ranks import ONE_RANK, join_ranks, leave_ranks
from speed_async.learner.parallel.sharding import load_for_rank
from speed_async.learner.trainer import Trainer

NUM_GROUPS, GROUP_SIZE = 4, 8


def measure_rank(rank: int, num_ranks: int, port: int, folder: Path, size: str) -> dict[str, float]:
    """In this process: the second update of this rank."""
    torch.set_num_threads(1)
    device, ranks = torch.device("cpu"), ONE_RANK
    if num_ranks > 1:
        ranks = join_ranks(
            TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            size=num_ranks,
            device=device,
            ranks_per_node=num_ranks,
            timeout_s=TIMEOUT_S,
        )
    model = load_for_rank(folder, ranks, device="cpu", activation_checkpointing="auto")
    trainer = Trainer(config=make_config(folder), model=model, ranks=ranks)
    vocabulary = MODEL_SHAPES[size]["vocab_size"]
    trainer.update(random_groups(1, 2, vocabulary, seed=1))  # allocates the optimiser state
    groups = random_groups(NUM_GROUPS, GROUP_SIZE, vocabulary, seed=0)
    meter = Meter()
    meter.begin()
    result = trainer.update(groups)
    meter.end()
    leave_ranks()
    return {"tokens": result.tokens, **meter.results}


def measure(num_ranks: int, folder: Path, size: str) -> dict[str, float]:
    """All ranks as processes: the slowest time and the largest memory."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "benchmarks.learner_ranks", "--size", size]
    processes = [
        subprocess.Popen(
            [*command, "--one", str(rank), str(num_ranks), str(store.port), str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise RuntimeError(f"ranks {failed} failed")
    results: list[dict[str, float]] = [json.loads(each.splitlines()[-1]) for each in outputs]
    return {key: max(result[key] for result in results) for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["30M", "135M"], default="30M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, help="rank, ranks, port, folder: one measurement")
    options = parser.parse_args()
    if options.one is not None:
        rank, num_ranks, port = map(int, options.one[:3])
        found = measure_rank(rank, num_ranks, port, Path(options.one[3]), options.size)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in options.ranks}
    with tempfile.TemporaryDirectory() as name:
        save_random_llama(options.size, Path(name))
        for _ in range(options.repeats):
            for count, own in runs.items():
                own.append(measure(count, Path(name), options.size))
    first = runs[options.ranks[0]]
    rows: list[dict[str, object]] = [
        {
            "ranks": count,
            "tokens_per_s": statistics.median(each["tokens"] / each["wall_s"] for each in own),
            "speed_to_first": statistics.median(
                one["wall_s"] / each["wall_s"] for one, each in zip(first, own, strict=True)
            ),
            "peak_mib_per_rank": statistics.median(each["peak_mib"] for each in own),
        }
        for count, own in runs.items()
    ]
    report("learner_ranks", f"One update by the number of ranks, {options.size} parameters", rows)


if __name__ == "__main__":
    main()
