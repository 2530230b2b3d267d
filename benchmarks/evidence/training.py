"""One training run with a fixed horizon in generated tokens, and what it cost at each version.

The run keeps its checkpoints for scoring and evaluates nothing but one prompt at its start and end.
It ends when it has generated `horizon_tokens`, whatever it has learned.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.process_times import ProcessTimes, machine_busy_s
from benchmarks.evidence.watch import RunWatch, Version
from benchmarks.harness import ROOT
from speed_async.launcher.processes import die_with_parent

POLL_S = 0.2
STALL_TIMEOUT_S = 180.0
"""Ends a run whose policy has collapsed, so that no group passes the gate."""
BUSY_CORES = 0.5
"""With more cores used by others, a run that ends early has failed: it may have been starved."""
RUN_TIMEOUT_S = 3600.0
END_GRACE_S = 60.0
MAX_UPDATES = 3000
"""Only bounds a run that nobody stops."""
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
}
CHECKPOINTS = "checkpoints"
"""Folder in a run folder."""
TRL_THREADS = 2
"""With one micro-batch per update, the fastest setting of benchmarks/trl.py."""
FIXED = {
    "task.name": "benchmarks.evidence.task:LiteralTask",
    "task.num_held_out": 1,
    "evaluate.every": 0,
    "run.updates": MAX_UPDATES,
    "learner.keep_last": MAX_UPDATES,
    "buffer.durability": "none",
    "cluster.stall_timeout_s": STALL_TIMEOUT_S,
    # A slow machine must not end a run or fail a completion.
    "cluster.connect_timeout_s": RUN_TIMEOUT_S,
    "cluster.peer_timeout_s": RUN_TIMEOUT_S,
    "weights.deadline_s": RUN_TIMEOUT_S,
    "actors.verifier_timeout_s": RUN_TIMEOUT_S,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    versions: list[Version]
    """Of every checkpoint, oldest first, without version 0."""
    ended: str
    """`horizon`, or why the run ended before it."""
    role_core_s: dict[str, float]
    """Of the whole run, start and end included."""
    process_s: float
    foreign_cores: float
    """Mean number of cores that other processes of the machine used meanwhile."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Completions and tokens by how their groups ended, staleness: from the run's summary."""


class RunFailed(Exception):
    """A run that counts for nothing: its configuration or the machine is at fault."""


def train_ours(
    arguments: Sequence[str], *, prompts: Path, folder: Path, horizon_tokens: int, every: int
) -> Trace:
    """Runs `speed-async train ARGUMENTS` in `folder`. Raises RunFailed."""
    fixed = FIXED | {
        "task.path": str(prompts),
        "run.folder": str(folder),
        "learner.checkpoint_every": every,
    }
    command = [sys.executable, "-m", "speed_async", "train", *arguments]
    command += [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
    start_s, busy_s = time.monotonic(), machine_busy_s()
    watch = RunWatch(folder / "metrics.jsonl", horizon_tokens)
    with (folder.parent / "output").open("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
        )
        times = ProcessTimes(process.pid)
        try:
            _follow(process, watch, times)
        finally:
            _end(process)
        output.seek(0)
        tail = output.read()[-2000:]
    watch.poll(sum(times.by_role().values()))
    if len(watch.steps) < every:
        raise RunFailed(f"{' '.join(command)} made {len(watch.steps)} updates:\n{tail}")
    reason = "horizon" if watch.stopped else (tail.strip().splitlines() or ["no output"])[-1]
    process_s = time.monotonic() - start_s
    role_core_s = {role: round(each_s, 2) for role, each_s in sorted(times.by_role().items())}
    foreign_cores = (machine_busy_s() - busy_s - sum(role_core_s.values())) / process_s
    if not watch.stopped and foreign_cores > BUSY_CORES:
        raise RunFailed(f"ended early on a busy machine ({foreign_cores:.1f} cores): {reason}")
    return Trace(
        versions=watch.versions(every),
        ended=reason,
        role_core_s=role_core_s,
        process_s=round(process_s, 2),
        foreign_cores=round(max(0.0, foreign_cores), 3),
        totals=_totals(folder / "summary.json"),
    )


def _follow(process: subprocess.Popen[bytes], watch: RunWatch, times: ProcessTimes) -> None:
    """Returns when the run has ended, by itself or because it reached its horizon."""
    end_s = time.monotonic() + RUN_TIMEOUT_S
    while process.poll() is None:
        watch.poll(times.sample())
        if watch.should_stop():
            process.send_signal(signal.SIGTERM)
        if time.monotonic() > end_s:
            raise RunFailed(f"the run took more than {RUN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _totals(summary: Path) -> dict[str, Any]:
    if not summary.exists():
        return {}
    values = json.loads(summary.read_text())
    return {
        "completions": values["completions_generated"],
        "gate_acceptance": values["gate_acceptance"],
        "staleness_mean": values["staleness_mean"],
        "tokens": values["ledger"]["tokens"],
    }


def train_trl(
    arguments: Sequence[str], *, prompts: Path, folder: Path, horizon_tokens: int, every: int
) -> Trace:
    """Runs TRL's RLOOTrainer on the same configuration. Raises RunFailed."""
    command = [sys.executable, "-m", "benchmarks.trl_arm", *arguments]
    command += ["--threads", str(TRL_THREADS)]
    command += ["--task.name", str(FIXED["task.name"]), "--task.path", str(prompts)]
    command += ["--task.num_held_out", "1", "--steps", str(MAX_UPDATES)]
    command += ["--max-tokens", str(horizon_tokens), "--checkpoint-every", str(every)]
    command += ["--checkpoints", str(folder / CHECKPOINTS)]
    start_s, busy_s, own_s = time.monotonic(), machine_busy_s(), _children_s()
    try:
        completed = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(str(error)) from error
    if completed.returncode:
        raise RunFailed(f"{' '.join(command)} failed:\n{completed.stderr[-2000:]}")
    process_s, core_s = time.monotonic() - start_s, _children_s() - own_s
    results = json.loads(completed.stdout.splitlines()[-1])
    steps = zip(results["tokens"], results["ends_s"], results["core_s"], strict=True)
    return Trace(
        versions=[
            Version(version=step, tokens=tokens, wall_s=round(end_s, 3), core_s=round(cores, 2))
            for step, (tokens, end_s, cores) in enumerate(steps, start=1)
            if step % every == 0
        ],
        ended="horizon",
        role_core_s={"trainer": round(core_s, 2)},
        process_s=round(process_s, 2),
        foreign_cores=round(max(0.0, (machine_busy_s() - busy_s - core_s) / process_s), 3),
    )


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system
