"""Whole runs with vLLM actors, started from the command line."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes.paths import MODEL
from tests.fakes.run_process import DEADLINE_S, Run, resume_train, start_train

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh)")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

FINISH_TIMEOUT_S = 2 * DEADLINE_S
"""vLLM starts in about 30 s with one core for each of its processes."""
VLLM = ["--actors.engine", "vllm", "--actors.vllm.enforce_eager", "true"]


def named(name: str, run_ids: set[int]) -> list[int]:
    """Processes with this name whose parent belongs to the run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == name:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z" and int(stat[1]) in run_ids:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_run_recovers_from_a_killed_vllm_and_leaves_no_process(tmp_path: Path) -> None:
    run = start_train(tmp_path, *VLLM, "--run.updates", "100000", "--weights.deadline_s", "10")
    run.wait_for_steps(3)
    [core] = named("VLLM::EngineCor", set(run.processes()))
    workers = named("VLLM::Worker", {core})
    os.kill(core, signal.SIGKILL)

    def has_restarted() -> bool:
        [*cores] = named("VLLM::EngineCor", set(run.processes()))
        return bool(cores) and cores != [core] and run.events("step")[-1]["actors_alive"] == 1

    run.wait_for("another vLLM", has_restarted)
    run.wait_for_steps(len(run.events("step")) + 3)
    [*cores] = named("VLLM::EngineCor", set(run.processes()))
    workers += named("VLLM::Worker", set(cores))
    run.interrupt()
    status, _, err = run.finish()
    assert status == 130, err
    summary = run.summary()
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["failures"]["actor lost"] >= 1
    assert run.processes() == {}
    assert not any(is_alive(process_id) for process_id in [core, *cores, *workers])


def finished(run: Run) -> Run:
    status, out, err = run.finish(FINISH_TIMEOUT_S)
    assert status == 0, f"{out}\n{err}"
    return run


def in_folder(folder: Path, *overrides: str) -> Run:
    folder.mkdir()
    return start_train(folder, *overrides)


def test_checkpoint_loads_in_transformers_vllm_and_another_run_and_resumes(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(sharded, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2

    first = finished(in_folder(tmp_path / "first", "--model.path", str(sharded)))
    checkpoint = first.folder / "checkpoints" / "version-000003"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    text = "12+34="
    assert model(
        **AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt")
    ).logits.any()

    overrides = ["--model.path", str(checkpoint)]
    finished(in_folder(tmp_path / "next", *overrides, "--run.updates", "1"))
    by_vllm = finished(in_folder(tmp_path / "vllm", *VLLM, *overrides, "--run.updates", "1"))
    assert by_vllm.summary()["completions_trained"] > 0
    finished(resume_train(first, "--run.updates", "4"))
    assert first.versions()[-1] == 4
    overrides = ["--model.path", str(sharded)]
    finished(in_folder(tmp_path / "shards", *VLLM, *overrides, "--run.updates", "1"))


def add_stray_tensors(model: Path) -> None:
    save_file({"lm_head.weight.exp_avg": torch.zeros(1)}, model / "optimizer.safetensors")


def set_unknown_architecture(model: Path) -> None:
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace("LlamaForCausalLM", "LlamaForNothing"))


@pytest.mark.parametrize(
    ("corrupt", "cause"),
    [
        (add_stray_tensors, "ValueError: Attempted to load nested weight 'lm_head.weight.exp_avg'"),
        (set_unknown_architecture, "Model architectures ['LlamaForNothing'] are not supported"),
    ],
)
def test_start_error_of_vllm_is_printed(
    tmp_path: Path, corrupt: Callable[[Path], None], cause: str
) -> None:
    """The first error is only in a worker's log; vLLM raises the second with its full text."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    corrupt(model)
    run = start_train(tmp_path, *VLLM, "--model.path", str(model))
    status, _, err = run.finish(FINISH_TIMEOUT_S)
    assert status == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: actor-1: vLLM did not start: ")
    assert cause in last
    assert "See root cause" not in last
    assert len(last) < 600


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
