"""A million malformed and mutated frames: no crash, no memory growth, and an unchanged ledger.

    python -m tests.faults.fuzz --frames 1000000 [--seed 0] [--engine both|own|atheris]

Nine of ten frames come from unknown peers under ever new names; the service's complete state must
be the same before and after. One of ten comes from a faulty actor, which has leases and sends
invalid messages: every group must stay accounted for exactly once, and the other actor must keep
its leases. If `atheris` is installed, it searches for more inputs by coverage, in a separate
process.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.fuzz_frames import FrameMutator
from tests.faults.fuzz_target import (
    CORRECT_ACTOR,
    FAULTY_ACTOR,
    FRAMES_PER_FAULTY_ACTOR,
    Target,
    UnknownPeers,
    groups_balance,
)

WARM_SHARE = 0.2
"""Share of the frames after which memory is stable: tables are bounded, but start empty."""
ALLOWED_GROWTH = 0.02


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def fuzz(num_frames: int, seed: int, model: Path) -> bool:
    """Print the results and return whether all invariants held."""
    mutator, unknown_peers = FrameMutator(seed), UnknownPeers(seed)
    outer, inner = Target(model), Target(model)
    before = outer.digest()
    reasons: Counter[str] = Counter()
    num_faulty_frames, num_faulty_actors, violations = 0, 1, 0
    warm_mib, largest_mib, start_s = 0.0, 0.0, time.perf_counter()
    for number in range(num_frames):
        frames = mutator.next()
        if number % 10:
            outer.receive(unknown_peers.next(), frames)
        else:
            inner.receive(FAULTY_ACTOR, frames)
            num_faulty_frames += 1
            if num_faulty_frames % FRAMES_PER_FAULTY_ACTOR == 0 or inner.is_muted(FAULTY_ACTOR):
                violations += not _holds(inner)
                reasons += inner.reasons
                inner, num_faulty_actors = Target(model), num_faulty_actors + 1
        if number == int(num_frames * WARM_SHARE):
            warm_mib = resident_mib()
        if number % 10_000 == 0:
            largest_mib = max(largest_mib, resident_mib())
            if outer.digest() != before:
                print(f"the state was changed by frame {number} or one of the 10,000 before it")
                return False
    wall_s = time.perf_counter() - start_s
    unchanged = outer.digest() == before
    growth = resident_mib() / warm_mib - 1
    reasons += outer.reasons
    print(
        f"{num_frames:,} frames in {wall_s:.0f} s, {num_frames / wall_s:,.0f} frames/s, seed {seed}"
    )
    print(f"exceptions: 0; state unchanged by unknown peers: {unchanged}")
    print(
        f"faulty actors: {num_faulty_actors:,}, {num_faulty_frames:,} frames, "
        f"violated invariants: {violations}"
    )
    print(
        f"memory: {warm_mib:.1f} MiB after {WARM_SHARE:.0%}, {resident_mib():.1f} MiB at the end "
        f"({growth:+.2%}), maximum {largest_mib:.1f} MiB"
    )
    print(f"joined with a valid Join: {outer.machine.service.membership.num_known - 2}")
    print(f"mute table: {outer.muted.num_blocked:,} muted, {len(outer.muted):,} held")
    for reason, count in reasons.most_common():
        print(f"  {count:>9,}  {reason}")
    return unchanged and not violations and growth < ALLOWED_GROWTH


def _holds(target: Target) -> bool:
    """Whether every group is accounted for, and the correct actor still has its leases."""
    service = target.machine.service
    has_leases = bool(service.lifecycle.leases.of_holder(CORRECT_ACTOR)) or service.ended
    return groups_balance(target) and has_leases


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
            print("--- mutations of a corpus of all message types")
            held = fuzz(arguments.frames, arguments.seed, Path(folder))
    if arguments.engine != "own":
        if importlib.util.find_spec("atheris") is None:
            print("--- atheris is not installed here (pip install atheris): not run")
        else:
            print("--- atheris: coverage-guided inputs", flush=True)
            command = [sys.executable, "-m", "tests.faults.fuzz_atheris", str(arguments.frames)]
            held = subprocess.run(command, check=False).returncode == 0 and held
    print("all held" if held else "NOT ALL HELD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
