# pyright: reportMissingImports=false
"""The same target under atheris: libFuzzer generates inputs that reach new code.

    python -m tests.faults.fuzz_atheris FRAMES

An input consists of the number of frames, their lengths, and their bytes. A tenth of the inputs
come from the faulty actor.
"""

import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["speed_async.transport", "speed_async.buffer"]
):
    from speed_async.transport.codec import encode
    from tests.faults.fuzz_frames import FrameMutator, Frames, corpus
    from tests.faults.fuzz_target import FAULTY_ACTOR, Target, UnknownPeers, groups_balance

from tests.faults.fuzz import ALLOWED_GROWTH, resident_mib

MAX_INPUT_BYTES = 4096


def packed(frames: Frames) -> bytes:
    """Serialize frames to an input."""
    lengths = b"".join(len(frame).to_bytes(2, "little") for frame in frames)
    return bytes([len(frames)]) + lengths + b"".join(frames)


def unpacked(data: bytes) -> Frames:
    """Parse arbitrary input bytes into frames."""
    count = data[0] % 16 if data else 0
    lengths = [int.from_bytes(data[1 + 2 * i : 3 + 2 * i], "little") for i in range(count)]
    frames, offset = [], 1 + 2 * count
    for length in lengths:
        frames.append(data[offset : offset + length])
        offset += length
    return frames


class FuzzTarget:
    def __init__(self, num_frames: int, model: Path) -> None:
        self._num_frames = num_frames
        self._model = model
        self._outer, self._inner = Target(model), Target(model)
        self._before = self._outer.digest()
        self._unknown_peers = UnknownPeers(0)
        self._number = 0
        self._warm_mib = 0.0
        self._start_s = time.perf_counter()

    def run_one(self, data: bytes) -> None:
        self._number += 1
        frames = unpacked(data)
        if self._number % 10:
            self._outer.receive(self._unknown_peers.next(), frames)
        else:
            self._inner.receive(FAULTY_ACTOR, frames)
            if self._inner.is_muted(FAULTY_ACTOR):
                assert groups_balance(self._inner)
                self._inner = Target(self._model)
        if self._number % 10_000 == 0:
            assert self._outer.digest() == self._before
        if self._number == self._num_frames // 5:
            self._warm_mib = resident_mib()
        if self._number == self._num_frames:
            self._report()

    def _report(self) -> None:
        wall_s = time.perf_counter() - self._start_s
        growth = resident_mib() / self._warm_mib - 1
        print(f"{self._number:,} inputs in {wall_s:.0f} s, {self._number / wall_s:,.0f} inputs/s")
        print(f"exceptions: 0; state unchanged: {self._outer.digest() == self._before}")
        print(f"memory {self._warm_mib:.1f} MiB after 20%, then {growth:+.2%}", flush=True)
        for reason, count in self._outer.reasons.most_common(40):
            print(f"  {count:>9,}  {reason}")
        assert growth < 5 * ALLOWED_GROWTH  # libFuzzer's own corpus grows
        sys.stdout.flush()


def main() -> None:
    num_frames = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        model, seeds = Path(folder) / "model", Path(folder) / "seeds"
        model.mkdir()
        seeds.mkdir()
        (model / "config.json").write_text("{}")
        mutator = FrameMutator(1)
        valid = [[bytes(frame) for frame in encode(message)] for message in corpus()]
        for number, frames in enumerate([*valid, *(mutator.next() for _ in range(500))]):
            data = packed(frames[:15])
            if len(data) <= MAX_INPUT_BYTES:
                (seeds / f"{number}").write_bytes(data)
        options = [
            f"-artifact_prefix={folder}/",
            f"-runs={num_frames}",
            f"-max_len={MAX_INPUT_BYTES}",
            "-rss_limit_mb=4096",
        ]
        fuzz_target = FuzzTarget(num_frames, model)
        atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(seeds)], fuzz_target.run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
