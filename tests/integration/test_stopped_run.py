"""A run that is stopped by Ctrl-C, and copies of it that are resumed."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.ended_run import GROUPS, OFTEN, assert_whole
from tests.fakes.open_sockets import is_loopback, watched
from tests.fakes.run_process import Run, copied, resume_train, start_torchrun, start_train

EVALUATED_EVERY = 20
# The service's two sockets; the learner's weight store; gloo on both sides.
LISTENERS = ("speed_async.launcher.child service", "speed_async.launch", "child actor")
pytestmark = pytest.mark.xdist_group("stopped run")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that has ended, and what it printed."""

    run: Run
    status: int
    out: str
    err: str
    listeners: dict[str, set[str]]
    """Listening addresses by command; empty unless they were watched."""

    @property
    def version(self) -> int:
        return self.run.summary()["policy_version"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Stopped by Ctrl-C at a version that is not evaluated. Before, another process fails to resume
    it."""
    endless = ("--run.updates", "100000", "--evaluate.every", str(EVALUATED_EVERY))
    run = start_train(tmp_path_factory.mktemp("stopped"), *endless, *OFTEN)
    with watched(run.process.pid) as seen:
        run.wait_for("every listener", lambda: all(map(partial(listens, dict(seen)), LISTENERS)))
        run.wait_for("a second evaluation", lambda: len(run.events("evaluation")) > 1)
        assert_in_progress(run)
        run.wait_for(
            "a version between two evaluations",
            lambda: 2 <= run.versions()[-1] % EVALUATED_EVERY <= EVALUATED_EVERY // 2,
        )
        run.interrupt()
        status, out, err = run.finish()
    assert run.processes() == {}
    return Ended(run=run, status=status, out=out, err=err, listeners=seen)


def assert_in_progress(run: Run) -> None:
    """Another process cannot resume it meanwhile."""
    status, _, err = resume_train(run).finish()
    assert status == 1
    assert err == (
        f"error: the run in '{run.folder}' is in progress: stop it first (Ctrl-C), or start a new "
        "run in another folder\n"
    )


def listens(seen: dict[str, set[str]], command: str) -> bool:
    return any(command in one and found for one, found in seen.items())


@pytest.fixture(scope="module")
def resumed(stopped: Ended, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A copy of the stopped run, resumed until it reached an accuracy."""
    run = copied(stopped.run, tmp_path_factory.mktemp("resumed"))
    run = resume_train(run, "--run.updates", "50000", "--run.stop_at_accuracy", "0.01")
    run.wait_for("an actor", lambda: "--incarnation 1000" in " ".join(run.processes().values()))
    status, out, err = run.finish()
    ended = Ended(run=run, status=status, out=out, err=err, listeners={})
    assert_whole(run, status, err, updates=ended.version)
    return ended


def test_ctrl_c_drains_saves_and_leaves_no_process(stopped: Ended) -> None:
    run = stopped.run
    assert stopped.status == 130
    # The stop is acknowledged at once; the run then ends neither completed nor failed.
    progress, closing = stopped.out.split("run ended: ", 1)
    assert "a second Ctrl-C ends the run immediately" in progress
    assert closing.startswith("stopped by a signal\n")
    assert f"\n  resume      speed-async train --resume {run.folder}\n" in closing
    [end] = run.events("end")
    assert (end["outcome"], end["ok"]) == ("stopped", False)
    summary = run.summary()
    assert (summary["outcome"], summary["completed"]) == ("stopped", False)
    # The last measured accuracy is shown although the last version was not evaluated.
    last = run.events("evaluation")[-1]
    version, accuracy = last["policy_version"], 100 * last["accuracy"]
    assert f"-> {accuracy:.1f} %" in closing
    if summary["accuracy_after"] is None:
        assert f"points) at version {version}, the last one measured" in closing
    assert summary["policy_version"] >= 5
    run.assert_saved()


def test_local_run_listens_on_loopback_only(stopped: Ended) -> None:
    addresses = set().union(*stopped.listeners.values())
    assert addresses and all(map(is_loopback, addresses)), stopped.listeners


def test_run_stopped_by_ctrl_c_resumes_and_completes(stopped: Ended, resumed: Ended) -> None:
    run = resumed.run
    assert resumed.version > stopped.version
    assert run.versions() == list(range(1, resumed.version + 1))  # no update was repeated
    resuming = f"resuming {run.folder} from version-{stopped.version:06d} (attempt 1)"
    assert resuming in resumed.err
    assert run.attempt() == 1
    ports, before = (
        json.loads((each.folder / "address.json").read_text()) for each in (run, stopped.run)
    )
    assert ports == before
    log = (run.folder / "logs" / "learner.log").read_text()
    assert log.index("attempt 0") < log.index("attempt 1")
    assert json.loads((run.folder / "config.json").read_text())["run"]["updates"] == 50000


def test_run_that_reached_its_accuracy_is_finished_until_the_target_is_raised(
    resumed: Ended, tmp_path: Path
) -> None:
    """Its newest checkpoint is damaged in the meantime: it is skipped and reported."""
    run, version = copied(resumed.run, tmp_path), resumed.version
    assert run.summary()["accuracy_reached"] >= 0.01
    status, out, _ = resume_train(run).finish()
    assert status == 0
    assert "was reached at version" in out
    with (run.folder / f"checkpoints/version-{version:06d}/model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")

    further = ("--run.stop_at_accuracy", "1", "--run.updates", str(version + 2))
    status, out, err = resume_train(run, *further).finish()
    assert_whole(run, status, err, updates=version + 2)
    notice = f"checkpoint version-{version:06d} is damaged (model.safetensors does not match its"
    assert notice in err
    assert any(notice in each for each in run.summary()["notices"])
    assert "note" in out.split("run ended", 1)[1]
    log = (run.folder / "logs" / "learner.log").read_text()
    assert notice in log
    assert f", replaying to {version}\n" in log


def test_run_resumed_at_its_last_update_is_evaluated_and_finished(
    stopped: Ended, tmp_path: Path
) -> None:
    """It can be resumed again without its summary, and by torchrun with one more rank for more
    updates without its journal."""
    run, reached = copied(stopped.run, tmp_path / "copy"), stopped.version
    assert run.summary()["accuracy_after"] is None
    status, _, err = resume_train(run, "--run.updates", str(reached)).finish()
    assert_whole(run, status, err, updates=reached)
    assert run.summary()["accuracy_after"] is not None
    assert run.versions() == list(range(1, reached + 1))
    before = run.summary(), run.attempt(), run.events("end")

    status, out, err = resume_train(run).finish()
    assert (status, err) == (0, "")
    assert out == (
        f"the run in '{run.folder}' is finished: it has completed its {reached} updates; to "
        "continue training, set a larger --run.updates\n"
    )
    status, out, err = start_torchrun(run.folder.parent, 3, resume=True).finish()
    assert status == 0, err
    assert f"the run in '{run.folder}' is finished" in out
    assert (run.summary(), run.attempt(), run.events("end")) == before
    assert run.processes() == {}

    (run.folder / "summary.json").unlink()  # as if the run had died just before writing it
    status, _, err = resume_train(run).finish()
    assert_whole(run, status, err, updates=reached)
    assert run.summary()["accuracy_after"] == before[0]["accuracy_after"]
    assert run.versions() == list(range(1, reached + 1))

    (run.folder / "journal").rename(tmp_path / "journal")
    further = ("--run.updates", str(reached + 2))
    status, _, err = start_torchrun(run.folder.parent, 3, *further, resume=True).finish()
    assert_whole(run, status, err, updates=reached + 2)
    assert run.attempt() == 3
    assert {path.name for path in (run.folder / "logs").glob("actor-?.log")} == {
        "actor-1.log",
        "actor-2.log",
    }
    # The new journal knows the earlier groups that were trained from the learner's report.
    groups = run.summary()["ledger"]["groups"]
    assert groups["generated"] >= groups["trained"] == GROUPS * (reached + 2)
