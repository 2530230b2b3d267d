"""What one GPU has to show: speed and memory of the learner, the engine and the weights.

Each part is a process with a time limit, so one that fails or hangs costs no other. The model is
random, with the shape of a real one: nothing is downloaded. The table goes into docs/benchmarks.md.

- matmul: the bf16 rate of one large matrix product (float32 on a CPU)
- update: an update of rows of one length. Its FLOPs against that rate (MFU; activations that are
  computed again do not count), and its peak memory against the formula of the preflight checks
- sharded: the same update with the parameters of one rank as FSDP has them with several
- weights: a transfer over ipc, checked by digests, against a copy within the device
- engine: the torch engine against `model.generate`, in useful tokens per second
- nccl: a communicator of one rank, and a broadcast
- quickstart: the whole run; held-out accuracy before and after
- vllm: the tests of the vLLM engine on the GPU, if vLLM is installed
- tests: the tests that need one GPU

Usage: bash scripts/gpu_check.sh [--parts PART ...] [--device cpu|cuda] [--size 0.8M|...|1.5B]
           [--row-tokens N] [--rows N]
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_setup import Options, Row, add_options, row
from benchmarks.harness import QUICKSTART, ROOT

LIMITS_S = {
    "matmul": 60,
    "update": 150,
    "sharded": 150,
    "weights": 60,
    "engine": 90,
    "nccl": 60,
    "quickstart": 120,
    "vllm": 240,
    "tests": 200,
}
"""Together more than the eight minutes that all parts may take: few reach theirs."""
NEED_GPU = ("nccl", "vllm", "tests")
VLLM_TESTS = ("tests/integration/test_vllm_engine.py", "-k", "not parallel")
"""Those of one worker."""


def run_part(part: str, options: Options) -> list[Row]:
    """The rows of a part; one with the reason if it fails."""
    began_s = time.perf_counter()
    try:
        if part == "quickstart":
            return quickstart(options, LIMITS_S[part])
        if part == "vllm":
            return tests("vLLM engine", VLLM_TESTS, LIMITS_S[part])
        if part == "tests":
            return tests("tests that need a GPU", ("-m", "gpu"), LIMITS_S[part])
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part]
        for name in ("device", "size", "row_tokens", "rows"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        return json.loads(output_of(command, LIMITS_S[part]).splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        return [failed(part, f"not done after {error.timeout:.0f} s")]
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        return [failed(part, f"exit status {error.returncode}: {lines[-1] if lines else ''}")]
    except Exception as error:  # a part that fails in a new way must not cost the others
        return [failed(part, repr(error))]
    finally:
        print(f"{part}: {time.perf_counter() - began_s:.0f} s", file=sys.stderr, flush=True)


def output_of(command: list[str], limit_s: float) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, check=True, cwd=ROOT
    ).stdout


def quickstart(options: Options, limit_s: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "speed_async", "train", str(QUICKSTART)]
        command += ["--run.folder", str(run)]
        command += ["--learner.device", options.device, "--actors.device", options.device]
        output_of(command, limit_s)
        summary = json.loads((run / "summary.json").read_text())
    return [
        row("quickstart", "accuracy before", summary["accuracy_before"]),
        row("quickstart", "accuracy after", summary["accuracy_after"], aim="0.9"),
        row("quickstart", "s", summary["wall_s"]),
    ]


def tests(what: str, chosen: Sequence[str], limit_s: float) -> list[Row]:
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT)
    [*_, outcome] = re.findall(
        r"^.*\b(?:passed|failed|error|skipped)\b.* in .*$", done.stdout, re.M
    )
    if done.returncode or "passed" not in outcome:
        return [failed(what, outcome)]
    return [{"what": what, "unit": "", "measured": outcome, "aim": "passed"}]


def failed(part: str, why: str) -> Row:
    return {"what": part, "unit": "", "measured": f"failed: {why}", "aim": ""}


def table(rows: list[Row], options: Options) -> str:
    """Markdown, with the machine in its first line."""
    shape = f"{options.size}, {options.rows} rows of {options.row_tokens:,} tokens"
    lines = [
        f"{machine(options.device)}; {shape}:",
        "",
        "| what | unit | measured | aim |",
        "| --- " * 4 + "|",
    ]
    lines += [
        f"| {each['what']} | {each['unit']} | {shown(each['measured'])} | {each['aim']} |"
        for each in rows
    ]
    return "\n".join(lines)


def shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}, transformers {version('transformers')}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*PARTS, "quickstart", "vllm", "tests"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    add_options(parser)
    options = parser.parse_args()
    chosen = [each for each in options.parts if options.device == "cuda" or each not in NEED_GPU]
    rows: list[Row] = []
    for part in chosen:
        measured = run_part(part, options)
        print(json.dumps(measured), file=sys.stderr, flush=True)
        rows += measured
    print(table(rows, options))
    return int(any(str(each["measured"]).startswith("failed") for each in rows))


if __name__ == "__main__":
    sys.exit(main())
