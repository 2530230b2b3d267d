"""Memory that many prompts cost one process: `python -m benchmarks.prompt_memory`.

Writes two JSON-lines files, one with --rows rows and one with 1,000. Processes of their own do with
each what those of a run do with their prompts. The cost is the difference of their peak resident
memory.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import QUICKSTART
from speed_async.config.load import parse_config
from speed_async.config.schema import Config

FEW = 1000
WORDS = ("the", "sum", "of", "all", "integers", "number", "is", "triangle", "area")


def first_reading(config: Config) -> None:
    """Write the Arrow file: the first process that opens the source."""
    from speed_async.environments.registry import make_task

    make_task(config.task)


def service(config: Config) -> None:
    from speed_async.environments.registry import make_task
    from speed_async.environments.task import data_fingerprint

    data_fingerprint(make_task(config.task), {})


def launcher_checks(config: Config) -> None:
    from speed_async.launcher.preflight.checks import run_checks

    run_checks(config)


def launcher_identity(config: Config) -> None:
    from speed_async.launcher.identity.identity import identify

    identify(config, run_id="x")


def actor(config: Config) -> None:
    """Read every tenth prompt, and thereby all pages of the file."""
    from speed_async.environments.registry import make_task

    for _ in make_task(config.task).train_prompts[::10]:
        pass


PARTS: tuple[Callable[[Config], None], ...] = (
    first_reading,
    service,
    launcher_checks,
    launcher_identity,
    actor,
)


def write_file(path: Path, num_rows: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(num_rows):
            text = " ".join(rng.choices(WORDS, k=rng.randint(15, 45)))
            row = {"problem": f"{index}: {text}?", "answer": str(rng.randint(0, 999))}
            file.write(json.dumps(row) + "\n")


def measure(part: str, path: Path) -> None:
    """Print the peak resident memory in MiB."""
    config = parse_config(
        {
            "model": {"path": str(QUICKSTART.parent / "model")},
            "task": {"name": "dataset", "path": str(path), "match": "math"},
            "run": {"folder": str(path.parent / "run")},
        }
    )
    next(each for each in PARTS if each.__name__ == part)(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {num: Path(folder) / f"{num}.jsonl" for num in (FEW, options.rows)}
        for num, path in paths.items():
            write_file(path, num)
        for part in PARTS:
            few, many = (_measured(part.__name__, path) for path in paths.values())
            print(f"{part.__name__:22} {many - few:5} MiB more ({few} with {FEW:,} rows)")


def _measured(part: str, path: Path) -> int:
    environment = os.environ | {"HF_DATASETS_CACHE": str(path.parent / "cache")}
    command = [sys.executable, "-m", "benchmarks.prompt_memory", "--measure", part, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
