"""Runs that are stopped or killed and resumed: each continues in its folder from its last state."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.run_process import Run, resume_train, start_torchrun, start_train

OFTEN = ("--learner.checkpoint_every", "2")
ENDLESS = ("--run.updates", "100000")
GROUPS, COMPLETIONS = 2, 8
"""Per update."""


def actors(run: Run) -> list[str]:
    return [command for command in run.processes().values() if "launcher.child actor" in command]


def attempt_of(run: Run) -> int:
    return json.loads((run.folder / "attempt.json").read_text())["attempt"]


def assert_whole(run: Run, status: int, err: str, *, updates: int) -> None:
    """One lineage from the first update to the last, in one folder, with a balanced ledger."""
    assert status == 0, err
    summary = run.summary()
    assert summary["policy_version"] == updates
    assert summary["optimizer_updates"] + summary["skipped_updates"] == updates
    assert summary["completions_trained"] == COMPLETIONS * summary["optimizer_updates"]
    assert summary["ledger"]["groups"]["trained"] == GROUPS * summary["optimizer_updates"]
    assert summary["ledger"]["checks"] == dict.fromkeys(summary["ledger"]["checks"], True)
    assert sorted(set(run.versions())) == list(range(1, updates + 1))
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["config.toml", "run"]
    assert (run.folder / "checkpoints" / f"version-{updates:06d}" / "SHA256SUMS").is_file()
    assert run.processes() == {}


def test_run_stopped_by_ctrl_c_resumes_and_completes(tmp_path: Path) -> None:
    first = start_train(tmp_path, *ENDLESS, *OFTEN)
    first.wait_for_steps(3)
    first.interrupt()
    assert first.finish()[0] == 130
    stopped_at = first.summary()["policy_version"]
    ports = json.loads((first.folder / "address.json").read_text())

    second = resume_train(first, "--run.updates", str(stopped_at + 3))
    second.wait_for("an actor", lambda: "--incarnation 1000" in " ".join(actors(second)))
    status, _, err = second.finish()
    assert_whole(second, status, err, updates=stopped_at + 3)
    assert second.versions() == list(range(1, stopped_at + 4))  # no update was repeated
    assert f"resuming {second.folder} from version-{stopped_at:06d} (attempt 1)" in err
    assert attempt_of(second) == 1
    assert json.loads((second.folder / "address.json").read_text()) == ports
    log = (second.folder / "logs" / "learner.log").read_text()
    assert log.index("attempt 0") < log.index("attempt 1")
    assert json.loads((second.folder / "config.json").read_text())["run"]["updates"] == (
        stopped_at + 3
    )


def wait_for_version(run: Run, version: int) -> None:
    run.wait_for(f"version {version}", lambda: max(run.versions(), default=0) >= version)


def test_run_resumes_and_completes_after_all_processes_were_killed(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS, *OFTEN)
    for updates in (5, 10):  # replayed updates can be replayed again
        wait_for_version(run, updates)
        run.kill()
        run = resume_train(run)
    wait_for_version(run, max(run.versions()) + 1)
    run.interrupt()
    assert run.finish()[0] == 130
    last = run.summary()["policy_version"] + 2
    run = resume_train(run, "--run.updates", str(last))
    status, _, err = run.finish()
    assert_whole(run, status, err, updates=last)
    assert attempt_of(run) == 3


def test_run_killed_before_its_first_checkpoint_replays_from_the_start(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS, "--learner.checkpoint_every", "0")
    run.wait_for_steps(3)
    run.kill()
    reached = max(run.versions())
    run = resume_train(run, "--run.updates", str(reached + 2))
    status, _, err = run.finish()
    assert_whole(run, status, err, updates=reached + 2)
    assert "from its start (attempt 1)" in err


def kill_learner(run: Run, after: int) -> None:
    run.wait_for_steps(after)
    os.kill(run.learner(), signal.SIGKILL)


def test_train_restarts_all_ranks_when_the_learner_dies(tmp_path: Path) -> None:
    run = start_train(tmp_path, "--run.updates", "12", *OFTEN, "--cluster.max_restarts", "1")
    kill_learner(run, after=5)
    status, _, err = run.finish()
    assert_whole(run, status, err, updates=12)
    assert attempt_of(run) == 1
    assert "resuming" in err


def test_torchrun_restarts_all_ranks_when_the_learner_dies(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 3, "--run.updates", "12", *OFTEN, max_restarts=2)
    kill_learner(run, after=5)
    run.wait_for("attempt 1", lambda: attempt_of(run) == 1 and max(run.versions()) >= 8)
    os.kill(run.learner(), signal.SIGKILL)
    status, _, err = run.finish()
    assert_whole(run, status, err, updates=12)
    assert attempt_of(run) == 2


def test_torchrun_resumes_a_run(tmp_path: Path) -> None:
    first = start_torchrun(tmp_path, 2, "--run.updates", "4")
    assert first.finish()[0] == 0
    second = start_torchrun(tmp_path, 3, "--run.updates", "6", resume=True)
    status, _, err = second.finish()
    assert_whole(second, status, err, updates=6)


def test_ranks_exit_promptly_when_the_learner_dies_without_a_restart(tmp_path: Path) -> None:
    """They do not wait for the drain timeout, because the service died with the learner."""
    run = start_train(tmp_path, *ENDLESS, "--cluster.drain_timeout_s", "60")
    run.wait_for_steps(2)
    began_s = time.monotonic()
    os.kill(run.learner(), signal.SIGKILL)
    status, _, _ = run.finish()
    assert status == 1
    assert time.monotonic() - began_s < 20
    assert run.processes() == {}


def test_damaged_checkpoint_is_skipped_and_reported(tmp_path: Path) -> None:
    first = start_train(tmp_path, *ENDLESS, *OFTEN)
    first.wait_for_steps(5)
    first.interrupt()
    assert first.finish()[0] == 130
    stopped_at = first.summary()["policy_version"]
    folder = first.folder / "checkpoints" / f"version-{stopped_at:06d}"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")

    second = resume_train(first, "--run.updates", str(stopped_at + 2))
    status, out, err = second.finish()
    assert_whole(second, status, err, updates=stopped_at + 2)
    notice = f"checkpoint version-{stopped_at:06d} is damaged (model.safetensors does not match its"
    assert notice in err
    assert any(notice in each for each in second.summary()["notices"])
    assert "note" in out.split("run ended", 1)[1]
    log = (second.folder / "logs" / "learner.log").read_text()
    assert notice in log
    assert f", replaying to {stopped_at}\n" in log


def test_run_restarts_from_version_0_when_all_checkpoints_are_damaged(
    tmp_path: Path,
) -> None:
    first = start_train(tmp_path, *ENDLESS, *OFTEN, "--learner.keep_last", "100000")
    wait_for_version(first, 5)
    first.kill()
    reached = max(first.versions())
    for model in first.folder.glob("checkpoints/version-*/model.safetensors"):
        model.write_bytes(b"")
    damaged = sorted(path.name for path in first.folder.glob("checkpoints/version-*"))
    assert damaged

    second = resume_train(first, "--run.updates", str(reached + 2))
    status, _, err = second.finish()
    assert_whole(second, status, err, updates=reached + 2)
    assert "resuming from the start (version 0, the initial model)" in err
    assert len(second.summary()["notices"]) == len(damaged)
    log = (second.folder / "logs" / "learner.log").read_text()
    assert f"resuming from version 0, replaying to {reached}\n" in log


def test_run_without_its_journal_resumes_from_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    first = start_train(tmp_path, *ENDLESS, *OFTEN)
    first.wait_for_steps(5)
    first.interrupt()
    assert first.finish()[0] == 130
    stopped_at = first.summary()["policy_version"]
    (first.folder / "journal").rename(tmp_path.parent / f"{tmp_path.name}-journal")

    second = resume_train(first, "--run.updates", str(stopped_at + 2))
    status, _, err = second.finish()
    assert_whole(second, status, err, updates=stopped_at + 2)
    # The new journal knows the earlier groups that were trained from the learner's report.
    groups = second.summary()["ledger"]["groups"]
    assert groups["generated"] >= groups["trained"] == GROUPS * (stopped_at + 2)


def test_run_in_progress_cannot_be_resumed(tmp_path: Path) -> None:
    run = start_train(tmp_path, *ENDLESS)
    run.wait_for_steps(1)
    status, _, err = resume_train(run).finish()
    assert status == 1
    assert err == (
        f"error: the run in '{run.folder}' is in progress: stop it first (Ctrl-C), or start a new "
        "run in another folder\n"
    )
    run.interrupt()
    assert run.finish()[0] == 130


def test_run_resumed_at_its_last_update_is_evaluated_and_finished(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path, *ENDLESS)
    run.wait_for_steps(2)
    run.interrupt()
    assert run.finish()[0] == 130
    reached = run.summary()["policy_version"]
    assert run.summary()["accuracy_after"] is None
    status, _, err = resume_train(run, "--run.updates", str(reached)).finish()
    assert_whole(run, status, err, updates=reached)
    assert run.summary()["accuracy_after"] is not None
    assert run.versions() == list(range(1, reached + 1))
    before = run.summary(), attempt_of(run), run.events("end")

    again = resume_train(run)
    status, out, err = again.finish()
    assert (status, err) == (0, "")
    assert out == (
        f"the run in '{run.folder}' is finished: it has completed its {reached} updates; to "
        "continue training, set a larger --run.updates\n"
    )
    status, out, err = start_torchrun(tmp_path, 3, resume=True).finish()
    assert status == 0, err
    assert f"the run in '{run.folder}' is finished" in out
    assert (run.summary(), attempt_of(run), run.events("end")) == before
    assert run.processes() == {}

    (run.folder / "summary.json").unlink()  # as if the run had died just before writing it
    status, _, err = resume_train(run).finish()
    assert_whole(run, status, err, updates=reached)
    assert run.summary()["accuracy_after"] == before[0]["accuracy_after"]
    assert run.versions() == list(range(1, reached + 1))


def test_run_that_reached_its_accuracy_is_finished_until_the_target_is_raised(
    tmp_path: Path,
) -> None:
    soon = ("--run.stop_at_accuracy", "0.01", "--evaluate.every", "1")
    run = start_train(tmp_path, *ENDLESS, *soon)
    assert run.finish()[0] == 0
    reached = run.summary()
    assert reached["accuracy_reached"] >= 0.01
    status, out, _ = resume_train(run).finish()
    assert status == 0
    assert "was reached at version" in out
    last = reached["policy_version"] + 2
    further = ("--run.stop_at_accuracy", "1", "--run.updates", str(last))
    status, _, err = resume_train(run, *further).finish()
    assert_whole(run, status, err, updates=run.summary()["policy_version"])
    assert run.summary()["policy_version"] > reached["policy_version"]


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
