"""Starting and stopping the ranks of a run: signals, launcher failures, and open sockets."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.open_sockets import is_loopback, watched
from tests.fakes.run_process import DEADLINE_S, Run, start_torchrun, start_train, write_config

ENDLESS = ("--run.updates", "100000")


def wait_until_gone(run: Run) -> None:
    """Wait until no process of a run is left whose launcher was killed."""
    ends_s = time.monotonic() + DEADLINE_S
    while left := run.processes():
        assert time.monotonic() < ends_s, f"still running: {left}"
        time.sleep(0.05)


def assert_saved(run: Run) -> None:
    summary = run.summary()
    assert summary["ledger"]["closes"] is True
    saved = run.folder / "checkpoints" / f"version-{summary['policy_version']:06d}"
    assert (saved / "SHA256SUMS").is_file()


# The service's two sockets; the learner's weight store; gloo on both sides.
LISTENERS = ("speed_async.launcher.child service", "speed_async.launch", "child actor")


def test_local_run_listens_on_loopback_only(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS)
    with watched(run.process.pid) as seen:
        ends_s = time.monotonic() + DEADLINE_S
        while not all(
            any(command in one and found for one, found in list(seen.items()))
            for command in LISTENERS
        ):
            assert run.process.poll() is None and time.monotonic() < ends_s, seen
            time.sleep(0.05)
        run.interrupt()
        status, _, err = run.finish()
    assert status == 130, err
    addresses = set().union(*seen.values())
    assert all(map(is_loopback, addresses)), seen


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGTERM])
def test_sighup_and_sigterm_drain_and_the_last_line_contains_the_resume_command(
    tmp_path: Path, which: signal.Signals
) -> None:
    run = start_train(tmp_path, *ENDLESS)
    run.wait_for_steps(1)
    run.process.send_signal(which)
    status, _, err = run.finish()
    assert status == 130
    last = err.splitlines()[-1]
    assert last == f"stopped by {which.name}; to resume: speed-async train --resume {run.folder}"
    assert_saved(run)
    assert run.processes() == {}


def test_under_nohup_sighup_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = start_train(tmp_path, "--run.updates", "6")
    finally:
        signal.signal(signal.SIGHUP, before)
    run.wait_for_steps(1)
    for process_id in (run.process.pid, *run.processes()):
        os.kill(process_id, signal.SIGHUP)
    status, _, err = run.finish()
    assert status == 0, err
    assert run.summary()["policy_version"] == 6


@pytest.mark.parametrize("launcher", ["speed-async", "torchrun"])
def test_ranks_drain_and_save_when_their_launcher_is_killed(tmp_path: Path, launcher: str) -> None:
    start = start_train if launcher == "speed-async" else start_two_ranks
    run = start(tmp_path, *ENDLESS)
    run.wait_for_steps(1)
    run.process.kill()
    run.process.wait()
    run.process.stdout.close()  # their output has no reader
    run.process.stderr.close()
    wait_until_gone(run)
    assert_saved(run)
    assert "the launcher of this run has died" in (run.folder / "logs/learner.log").read_text()
    assert "Traceback" not in (run.folder / "logs/learner.log").read_text()
    assert run.summary()["reason"] == "stopped: the launcher of this run has died"


def start_two_ranks(folder: Path, *overrides: str) -> Run:
    return start_torchrun(folder, 2, *overrides)


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
    wait_until_gone(run)


def test_killed_rank_is_named_in_the_last_line(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS)
    run.wait_for_steps(1)
    os.kill(run.learner(), signal.SIGKILL)
    status, _, err = run.finish()
    assert status == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: learner (rank 0): was killed by SIGKILL")
    assert last.endswith(f"see {run.folder}/logs")
    assert err.splitlines()[:-1] == ["preflight checks passed"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not available")
def test_unresolvable_host_name_causes_no_delay(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--uts"]
    probe = subprocess.run([*namespace, "hostname", "x"], capture_output=True, timeout=240)
    if probe.returncode:
        pytest.skip("no permission to create a namespace with another host name")
    command = [sys.executable, "-m", "speed_async", "train", str(write_config(tmp_path))]
    script = 'hostname nowhere-at-all.invalid && exec "$@"'
    done = subprocess.run(
        [*namespace, "sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,  # resolving the name would take ten minutes
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options", [["--nnodes", "1:2"], ["--nnodes=1:2"], ["--nn", "1:2"], ["PET_NNODES=1:2"]]
)
def test_elastic_number_of_nodes_is_rejected_at_the_start(
    tmp_path: Path, options: list[str]
) -> None:
    environment = {"PET_NNODES": "1:2"} if options[0].startswith("PET") else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [] if environment else options
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-conf"]
    command += ["last_call_timeout=1", "-m", "speed_async.launch", str(write_config(tmp_path))]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode != 0
    assert "--nnodes 1:2: the number of nodes of a run cannot change" in done.stderr
    assert not (tmp_path / "run").exists()
