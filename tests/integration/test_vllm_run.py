"""A whole run with a vLLM actor, started from the command line."""

import os
import signal
from pathlib import Path

import pytest

from tests.fakes.run_process import start_train, write_config
from tests.fakes.vllm_setup import NEEDS_VLLM

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(1800)]

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


@pytest.mark.xdist_group("completed run")
def test_run_from_a_checkpoint_recovers_from_a_killed_vllm_and_leaves_no_process(
    tmp_path: Path, checkpoint: Path
) -> None:
    overrides = ("--run.updates", "100000", "--weights.deadline_s", "10")
    config = write_config(tmp_path, model=checkpoint)
    run = start_train(tmp_path, *VLLM, *overrides, config=config)
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
    assert summary["completions_trained"] > 0
    assert run.processes() == {}
    assert not any(is_alive(process_id) for process_id in [core, *cores, *workers])


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
