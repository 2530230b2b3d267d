"""Starting and stopping the ranks of a run by torchrun, and the failure of torchrun."""

from pathlib import Path

from tests.fakes.ended_run import OFTEN
from tests.fakes.run_process import start_torchrun

ENDLESS = ("--run.updates", "100000")
LAST_CALL = "last_call_timeout=1"
"""Seconds in which torchrun waits for further nodes."""


def test_elastic_number_of_nodes_is_rejected_at_the_start(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 2, torchrun=("--nnodes", "1:2", "--rdzv-conf", LAST_CALL))
    status, _, err = run.finish()
    assert status != 0
    assert "--nnodes 1:2: the number of nodes of a run cannot change" in err
    assert not run.folder.exists()


def test_torchrun_restarts_its_ranks_and_drains_them_when_it_is_killed(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 2, *ENDLESS, *OFTEN, max_restarts=2)
    run.wait_for_steps(5)
    for attempt in (1, 2):
        run.kill_learner()
        before = max(run.versions())
        run.wait_for(f"attempt {attempt}", lambda attempt=attempt: run.attempt() == attempt)
        run.wait_for_version(before + 3)
    run.kill_launcher()
    run.assert_saved()
    log = (run.folder / "logs/learner.log").read_text()
    assert "the launcher of this run has died" in log
    assert "Traceback" not in log
    assert run.summary()["reason"] == "stopped: the launcher of this run has died"
