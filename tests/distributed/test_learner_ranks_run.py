"""Whole runs with two learner ranks, one of which is killed."""

import os
import signal
from pathlib import Path

from tests.fakes.ended_run import OFTEN
from tests.fakes.run_process import resume_train, start_torchrun, start_train

TWO = ("--cluster.learners", "2")
ENDLESS = ("--run.updates", "100000")


def test_run_continues_from_its_checkpoint_when_either_learner_rank_is_killed(
    tmp_path: Path,
) -> None:
    run = start_train(tmp_path, *TWO, *ENDLESS, *OFTEN, "--cluster.max_restarts", "2")
    try:
        run.wait_for_steps(3)
        for attempt, rank in ((1, 1), (2, 0)):
            os.kill(run.rank(rank), signal.SIGKILL)
            before = max(run.versions())
            run.wait_for(f"attempt {attempt}", lambda attempt=attempt: run.attempt() == attempt)
            run.wait_for_version(before + 3)
        run.interrupt()
        status, _, err = run.finish()
        assert status == 130, err
        assert "learner (rank 1): was killed by SIGKILL" in err
        assert "learner (rank 0): was killed by SIGKILL" in err
        assert "learner-1: has exited" in run.events("end")[0]["reason"]
        run.assert_saved()
        run.wait_for_no_process()
        updates = str(max(run.versions()) + 2)
        run = resume_train(run, "--cluster.learners", "1", "--run.updates", updates)
        assert run.finish()[0] == 0
    finally:
        run.kill()


def test_torchrun_starts_two_learner_ranks(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 3, *TWO, "--run.updates", "3")
    try:
        status, _, err = run.finish()
        assert status == 0, err
        run.assert_saved()
        assert run.summary()["optimizer_updates"] == 3
        training = run.folder / "checkpoints/version-000003/training"
        assert [path.name for path in sorted(training.glob("*.tensors"))] == [
            "optimizer-00001-of-00002.tensors",
            "optimizer-00002-of-00002.tensors",
            "weights-00001-of-00002.tensors",
            "weights-00002-of-00002.tensors",
        ]
    finally:
        run.kill()
