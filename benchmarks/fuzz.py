"""A million malformed and mutated frames: no crash, no growth, the ledger untouched.

    python -m benchmarks.fuzz --frames 1000000 [--seed 0] [--engine both|own|atheris]

Nine frames of ten come from strangers under ever new names; the service's whole state must be the
same before and after. One of ten comes from an insider, an actor with leases that begins to lie:
whatever it says, every group stays somewhere exactly once, and the other actor keeps its leases.
`atheris`, where it is installed, looks for more by coverage, in a process of its own.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.fuzz_frames import Spoiler
from benchmarks.fuzz_target import HONEST, LIAR, LIES_EACH, Strangers, Target, books_close

WARM_SHARE = 0.2
"""Share of the frames after which memory has its size: tables are bounded, but start empty."""
ALLOWED_GROWTH = 0.02


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def fuzz(num_frames: int, seed: int, model: Path) -> bool:
    """Print what came of it; whether all held."""
    spoiler, strangers = Spoiler(seed), Strangers(seed)
    outer, inner = Target(model), Target(model)
    before = outer.digest()
    reasons: Counter[str] = Counter()
    lies, insiders, broken = 0, 1, 0
    warm_mib, largest_mib, began_s = 0.0, 0.0, time.perf_counter()
    for number in range(num_frames):
        frames = spoiler.next()
        if number % 10:
            outer.receive(strangers.next(), frames)
        else:
            inner.receive(LIAR, frames)
            lies += 1
            if lies % LIES_EACH == 0 or LIAR.encode() in inner.muted:
                broken += not _holds(inner)
                reasons += inner.reasons
                inner, insiders = Target(model), insiders + 1
        if number == int(num_frames * WARM_SHARE):
            warm_mib = resident_mib()
        if number % 10_000 == 0:
            largest_mib = max(largest_mib, resident_mib())
            if outer.digest() != before:
                print(f"the service was touched by frame {number} or one of 10,000 before")
                return False
    wall_s = time.perf_counter() - began_s
    untouched = outer.digest() == before
    growth = resident_mib() / warm_mib - 1
    reasons += outer.reasons
    print(
        f"{num_frames:,} frames in {wall_s:.0f} s, {num_frames / wall_s:,.0f} frames/s, seed {seed}"
    )
    print(f"exceptions: 0; state untouched by strangers: {untouched}")
    print(f"insiders: {insiders:,} runs, {lies:,} frames, books open or leases taken: {broken}")
    print(
        f"memory: {warm_mib:.1f} MiB after {WARM_SHARE:.0%}, {resident_mib():.1f} MiB at the end "
        f"({growth:+.2%}), most {largest_mib:.1f} MiB"
    )
    print(f"joined by a valid Join: {outer.machine.service.membership.num_known - 2}")
    print(f"mute table: {outer.muted.num_muted:,} muted, {len(outer.muted):,} held")
    for reason, count in reasons.most_common():
        print(f"  {count:>9,}  {reason}")
    return untouched and not broken and growth < ALLOWED_GROWTH


def _holds(target: Target) -> bool:
    """Every group is somewhere, and the honest actor still has its leases and its place."""
    service = target.machine.service
    has_leases = bool(service.lifecycle.leases.of_holder(HONEST)) or service.ended
    return books_close(target) and has_leases


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("both", "own", "atheris"), default="both")
    arguments = parser.parse_args()
    held = True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        if arguments.engine != "atheris":
            print("--- own mutations of a corpus of every message")
            held = fuzz(arguments.frames, arguments.seed, Path(folder))
    if arguments.engine != "own":
        if importlib.util.find_spec("atheris") is None:
            print("--- atheris is not installed here (pip install atheris): not run")
        else:
            print("--- atheris: inputs chosen by coverage", flush=True)
            command = [sys.executable, "-m", "benchmarks.fuzz_atheris", str(arguments.frames)]
            held = subprocess.run(command, check=False).returncode == 0 and held
    print("all held" if held else "NOT ALL HELD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
