"""Runs that are stopped or killed and resumed: each continues in its folder from its last state."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.command_line import run_command
from tests.fakes.ended_run import assert_whole
from tests.fakes.run_process import Run, resume_train, start_train

ENDLESS = ("--run.updates", "100000")
NEW_UPDATES = 8
"""More than the groups that the journal holds suffice for: an actor has to contribute."""


def end_by_power_failure(run: Run) -> str:
    """Returns what the launcher wrote to stderr."""
    run.kill()
    return run.finish()[2]


def end_with_stopped_learner(run: Run) -> None:
    """By a second Ctrl-C, after which the launcher kills the ranks that do not exit."""
    os.kill(run.learner(), signal.SIGSTOP)
    run.interrupt()
    time.sleep(1.5)  # an earlier signal would count as a duplicate of the first Ctrl-C
    run.interrupt()
    status, _, err = run.finish()
    assert status == 130
    assert err.splitlines()[-1].startswith("stopped by SIGINT")
    run.wait_for_no_process()


def end_by_killed_learner(run: Run) -> None:
    """All ranks are restarted once. After another death they do not wait for the drain timeout: the
    service has died with the learner."""
    attempt, before = run.attempt(), max(run.versions())
    run.kill_learner()
    run.wait_for("a restart", lambda: run.attempt() == attempt + 1)
    run.wait_for_version(before + NEW_UPDATES)
    began_s = time.monotonic()
    run.kill_learner()
    status, _, err = run.finish()
    assert status == 1
    assert time.monotonic() - began_s < 20  # less than the drain timeout of 60 s
    killed = "learner (rank 0): was killed by SIGKILL"
    assert len(err.splitlines()) == 4, err
    resuming, restarting, again, last = err.splitlines()
    assert resuming.startswith(f"resuming {run.folder} from version-")
    assert restarting.startswith(killed) and restarting.endswith("restarting all ranks (restart 1)")
    assert again.startswith(f"resuming {run.folder} from version-")
    assert last.startswith(f"error: {killed}") and last.endswith(f"see {run.folder}/logs")
    assert run.processes() == {}


def end_by_second_ctrl_c(run: Run) -> None:
    """SIGINT is sent to the leading learner, as the launcher forwards it."""
    learner = run.learner()
    os.kill(run.child("actor"), signal.SIGSTOP)  # the actor cannot drain
    os.kill(learner, signal.SIGINT)
    run.wait_for_event("a stop", lambda values: values["phase"] in ("stopping", "draining"))
    began_s = time.monotonic()
    while learner in run.processes():
        assert time.monotonic() - began_s < 30  # less than the drain timeout of 60 s
        with contextlib.suppress(ProcessLookupError):
            os.kill(learner, signal.SIGINT)
        time.sleep(0.25)
    status, out, err = run.finish()
    assert status == 130, err
    assert out.endswith(
        "stopped immediately by a second Ctrl-C, without a final checkpoint and summary\n"
        f"  resume      speed-async train --resume {run.folder}\n"
    )
    assert not (run.folder / "summary.json").exists()
    run.wait_for_no_process()


def end_by_killed_launcher(run: Run) -> None:
    run.kill_launcher()
    run.assert_saved()
    log = (run.folder / "logs" / "learner.log").read_text()
    assert "the launcher of this run has died" in log
    assert "Traceback" not in log
    assert run.summary()["reason"] == "stopped: the launcher of this run has died"


def damage_all_checkpoints(run: Run) -> int:
    """Returns how many there were."""
    damaged = [*run.folder.glob("checkpoints/version-*/model.safetensors")]
    for model in damaged:
        model.write_bytes(b"")
    return len(damaged)


def test_run_resumes_after_each_sudden_end_and_replays_to_its_last_version(tmp_path: Path) -> None:
    """Each attempt ends in another way; replayed updates are replayed again. Every attempt keeps
    its checkpoints, so that all of them can be damaged at the end."""
    keep = ("--learner.keep_last", "100", "--cluster.drain_timeout_s", "60")
    run = start_train(tmp_path, *ENDLESS, *keep, "--learner.checkpoint_every", "0")
    run.wait_for_steps(3)
    end_with_stopped_learner(run)  # before the first checkpoint

    reached = max(run.versions())
    run = resume_train(run, "--learner.checkpoint_every", "4")
    run.wait_for_version(reached + NEW_UPDATES)
    assert "from its start (attempt 1)" in end_by_power_failure(run)

    run = resume_train(run, "--cluster.max_restarts", "1")
    run.wait_for_version(max(run.versions()) + NEW_UPDATES)
    end_by_killed_learner(run)

    run = resume_train(run, "--cluster.max_restarts", "0")
    run.wait_for_version(max(run.versions()) + NEW_UPDATES)
    end_by_second_ctrl_c(run)

    run = resume_train(run)
    run.wait_for_version(max(run.versions()) + NEW_UPDATES)
    end_by_killed_launcher(run)

    reached = max(run.versions())
    num_damaged = damage_all_checkpoints(run)
    assert num_damaged
    run = resume_train(run, "--run.updates", str(reached + 2))
    status, out, err = run.finish()
    assert_whole(run, status, err, updates=reached + 2)
    warnings = [line for line in out.splitlines() if line.startswith("warning ")]
    assert [line for line in warnings if "restart" in line or "resumed" in line] == [
        line
        for line in warnings
        if line.endswith(f"updates to {reached} are repeated from the journal")
    ]
    assert sum("resumed from version 0; updates to" in line for line in warnings) == 1
    assert run.attempt() == 6
    assert "resuming from the start (version 0, the initial model)" in err
    assert len(run.summary()["notices"]) == num_damaged
    log = (run.folder / "logs" / "learner.log").read_text()
    assert f"resuming from version 0, replaying to {reached}\n" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --resume '"),
        (["--learner.lr", "1e-4"], "not a run folder"),
    ],
)
def test_folder_without_a_run_is_rejected_in_one_line_before_torch_loads(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = ["speed-async", "train", "--resume", str(tmp_path), *arguments]
    code = (
        "import sys\nfrom speed_async.cli import main\n"
        f"sys.argv = {command!r}\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_beside_resume_is_refused_and_not_taken_for_an_override(
    tmp_path: Path,
) -> None:
    status, _, error = run_command(tmp_path, "train", "--resume", "runs/a", "my.toml")
    assert status == 2
    assert "--resume runs/a takes no CONFIG, and 'my.toml' was given: remove it" in error
