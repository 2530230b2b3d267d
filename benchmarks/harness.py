"""Shared by all benchmarks: other programs, runs, services, and results as a table and as JSON."""

import json
import multiprocessing
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from speed_async.config.load import build_config, save_config
from speed_async.config.schema import Config
from speed_async.transport.messages import GroupFinished
from speed_async.types import ActorCounts

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "quickstart" / "config.toml"
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT_S = 900.0
SERVICE_START_S = 60.0
FOREVER = 10**9
TASK: dict[str, object] = {"name": "arithmetic", "num_prompts": 4096, "num_held_out": 1}
"""Task of a service whose peers are simulated."""
MODEL: dict[str, object] = {"path": str(QUICKSTART.parent / "model"), "context_length": 1 << 20}
CREDITS = 64
GROUP_SIZE = 24
GROUPS_A_BATCH = 16
PROMPT_TOKENS = 128
VOCABULARY = 8
"""Token ids that exist in any model."""

MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "0.8M": {
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "30M": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "135M": {  # as SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.5B": {  # as Qwen2.5-1.5B
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}

SPAWN = multiprocessing.get_context("spawn")
Work = tuple[Callable, tuple]


def copy_tokenizer(folder: Path) -> None:
    """Makes a model folder with the quickstart's tokenizer and without a model."""
    others = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(QUICKSTART.parent / "model", folder, ignore=others)


def output_of(command: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """Run another program and return its stdout. RuntimeError with the tail of its stderr."""
    texts = list(map(str, command))
    completed = subprocess.run(
        texts, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if completed.returncode:
        raise RuntimeError(f"{' '.join(texts)} failed:\n{completed.stderr[-2000:]}")
    return completed.stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    """The lines of metrics.jsonl."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def train(
    arguments: Sequence[str | Path], environment: Mapping[str, str] = os.environ
) -> TrainingRun:
    """Run `speed-async train ARGUMENTS` with a run folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        command = [sys.executable, "-m", "speed_async", "train", *arguments]
        output_of([*command, "--run.folder", folder], environment)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((folder / "summary.json").read_text())
    return TrainingRun(summary=summary, events=[json.loads(line) for line in lines])


def service_config(
    *,
    durability: str,
    credits: int = CREDITS,
    capacity_groups: int = 1024,
    group_size: int = GROUP_SIZE,
    key_folder: Path | None = None,
) -> Config:
    """A run without gate, staleness limit or end, so that only the service limits the speed."""
    cluster: dict[str, object] = {"stall_timeout_s": float(FOREVER), "actors": 1}
    if key_folder is not None:
        cluster |= {"security": "curve", "keys": str(key_folder)}
    tree: dict[str, dict[str, object]] = {
        "run": {"updates": FOREVER},
        "model": MODEL,
        "actors": {"max_new_tokens": 1 << 16},
        "task": TASK,
        "gate": {"mode": "off", "n_init": group_size, "n_cont": 0},
        "learner": {"groups_per_update": GROUPS_A_BATCH},
        "buffer": {
            "capacity_groups": capacity_groups,
            "capacity_bytes": 8 * 1024**3,
            "credits": credits,
            "max_staleness": FOREVER,
            "durability": durability,
        },
        "evaluate": {"every": 0},
        "cluster": cluster,
        "observe": {"status_interval_s": 0.5},
    }
    return build_config({"algorithm": "rloo", **tree})


@dataclass(frozen=True, kw_only=True)
class RunningService:
    process_id: int
    port: int
    feed_port: int
    run_folder: Path


@contextmanager
def service(config: Config) -> Iterator[RunningService]:
    """Run the buffer service as in a run, with a run folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        saved = Path(folder) / "config.json"
        save_config(config, saved)
        command = [sys.executable, "-m", "speed_async.launcher.child", "service"]
        command += ["--parent", str(os.getpid()), "--run-folder", folder, "--config", str(saved)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], SERVICE_START_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                raise RuntimeError("the service did not start")
            yield RunningService(
                process_id=process.pid, run_folder=Path(folder), **json.loads(line)
            )
        finally:
            process.kill()
            process.wait()


@contextmanager
def running_processes(*works: Work) -> Iterator[list[int]]:
    """Start a process per work item and yield their ids; kill them on exit."""
    processes = [SPAWN.Process(target=work, args=args, daemon=True) for work, args in works]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def make_group(tokens_each: int, group_size: int = GROUP_SIZE) -> GroupFinished:
    """A group whose first half passed."""
    total = tokens_each * group_size
    rng = np.random.default_rng(0)
    return GroupFinished(
        counts=ActorCounts(),
        lease_id=0,
        prompt_id=0,
        num_screening=0,
        prompt_token_ids=rng.integers(0, VOCABULARY, PROMPT_TOKENS).astype(np.int32),
        lengths=np.full(group_size, tokens_each, np.int32),
        rewards=(np.arange(group_size) < group_size // 2).astype(np.float32),
        passed=(np.arange(group_size) < group_size // 2).astype(np.int32),
        cut=np.zeros(group_size, np.int32),
        token_ids=rng.integers(0, VOCABULARY, total).astype(np.int32),
        logprobs=-rng.random(total).astype(np.float32),
        policy_versions=np.zeros(total, np.int32),
    )


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each value over the runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def report(name: str, title: str, rows: list[dict[str, object]]) -> None:
    """Print `rows` (all with the same keys) and write them to results/NAME.json."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": _machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _machine() -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
