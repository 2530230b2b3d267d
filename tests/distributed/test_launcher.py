"""Starting and stopping the ranks of a run: signals, launcher failures, and open sockets."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.open_sockets import is_loopback, watched
from tests.fakes.resumed_run import OFTEN, assert_whole
from tests.fakes.run_process import start_torchrun, start_train

ENDLESS = ("--run.updates", "100000")
LAST_CALL = "last_call_timeout=1"
"""Seconds in which torchrun waits for further nodes."""
# The service's two sockets; the learner's weight store; gloo on both sides.
LISTENERS = ("speed_async.launcher.child service", "speed_async.launch", "child actor")


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGTERM])
def test_local_run_listens_on_loopback_only_and_is_drained_by_a_signal(
    tmp_path: Path, which: signal.Signals
) -> None:
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
        run.process.send_signal(which)
        status, _, err = run.finish()
    assert status == 130, err
    addresses = set().union(*seen.values())
    assert all(map(is_loopback, addresses)), seen
    # The last line contains the resume command.
    last = err.splitlines()[-1]
    assert last == f"stopped by {which.name}; to resume: speed-async train --resume {run.folder}"
    run.assert_saved()
    assert run.processes() == {}


def test_second_ctrl_c_ends_all_ranks_immediately(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS)
    run.wait_for_steps(1)
    learner = run.learner()
    os.kill(learner, signal.SIGSTOP)  # the learner cannot stop gracefully
    run.interrupt()
    time.sleep(1.5)  # an earlier signal would count as a duplicate of the first Ctrl-C
    run.interrupt()
    status, _, err = run.finish()
    assert status == 130
    assert err.splitlines()[-1].startswith("stopped by SIGINT")
    run.wait_for_no_process()


def test_elastic_number_of_nodes_is_rejected_at_the_start(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 2, torchrun=("--nnodes", "1:2", "--rdzv-conf", LAST_CALL))
    status, _, err = run.finish()
    assert status != 0
    assert "--nnodes 1:2: the number of nodes of a run cannot change" in err
    assert not run.folder.exists()


def test_torchrun_restarts_its_ranks_drains_them_when_it_is_killed_and_resumes(
    tmp_path: Path,
) -> None:
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
    summary = run.summary()
    assert summary["reason"] == "stopped: the launcher of this run has died"

    updates = summary["policy_version"] + 2
    run = start_torchrun(tmp_path, 3, "--run.updates", str(updates), resume=True)
    status, _, err = run.finish()
    assert_whole(run, status, err, updates=updates)
    assert run.attempt() == 3
    assert {path.name for path in (run.folder / "logs").glob("actor-?.log")} == {
        "actor-1.log",
        "actor-2.log",
    }
