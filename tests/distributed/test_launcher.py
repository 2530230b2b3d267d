"""Starting and stopping the ranks of a run: signals, launcher failures, and open sockets."""

import signal
from pathlib import Path

from tests.fakes.ended_run import OFTEN, drain
from tests.fakes.open_sockets import is_loopback, watched
from tests.fakes.run_process import start_torchrun, start_train

ENDLESS = ("--run.updates", "100000")
LAST_CALL = "last_call_timeout=1"
"""Seconds in which torchrun waits for further nodes."""
# The service's two sockets; the learner's weight store; gloo on both sides.
LISTENERS = ("speed_async.launcher.child service", "speed_async.launch", "child actor")


def test_local_run_listens_on_loopback_only_and_is_drained_by_sigterm(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS)
    with watched(run.process.pid) as seen:
        run.wait_for(
            "every listener",
            lambda: all(
                any(command in one and found for one, found in list(seen.items()))
                for command in LISTENERS
            ),
        )
        run.wait_for_steps(1)
        drain(run, signal.SIGTERM)
    addresses = set().union(*seen.values())
    assert all(map(is_loopback, addresses)), seen


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
