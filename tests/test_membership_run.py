"""Whole runs in which actors die, hang, come and go: the run goes on, and its books close.

Two actors train; something happens to the second one. What it costs the learner is read off the
times of the updates in metrics.jsonl.
"""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_process import Run, start_actor, start_train

pytestmark = pytest.mark.timeout(240)

DEADLINE_S = 3.0
SLACK_S = 3.0
"""On top of the deadline, between the updates that a failed broadcast lies between: half a second
for the others to say that they live, a new group, an update, and a machine with much to do."""
SETTINGS = {
    "run.updates": 60,
    "cluster.actors": 2,
    "weights.deadline_s": DEADLINE_S,
    "gate.n_init": 4,
    "gate.n_cont": 12,
    "learner.groups_per_update": 8,
}


def overrides(**changes: object) -> list[str]:
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@contextmanager
def training(folder: Path, **changes: object) -> Iterator[Run]:
    """A run in which all actors have weights; whatever the test does, it leaves no process."""
    run = start_train(folder, *overrides(**changes))

    def all_have_weights() -> bool:
        last = run.events("step")[-1]
        return last["actors_alive"] == last["actors_total"] and last["weights/lag_max"] == 1

    try:
        run.wait_for_steps(2)
        with run.slowly():
            run.wait_for("the last actor", all_have_weights)
        yield run
    finally:
        for process_id in run.processes():
            os.kill(process_id, signal.SIGKILL)
        run.process.kill()
        run.process.wait()


def stop_in_mid_broadcast(run: Run, role: str, index: int) -> int:
    """Stop a process; returns its id once a broadcast waits for it.

    Broadcasts of this model take a few hundredths of a second. One that is under way for a second
    began, or went on, without the stopped process, and cannot end before the deadline.
    """
    process_id = run.child(role, index)
    os.kill(process_id, signal.SIGSTOP)
    run.hear("a broadcast that waits", lambda values: values["weights/publishing_s"] > 1.0)
    return process_id


def wait_until_back(run: Run, name: str) -> None:
    """Until an actor that was lost holds weights again, at most a version or two behind."""
    key = f"weights/lag/{name}"

    def is_lost() -> bool:
        return key not in run.events("step")[-1]

    def is_back() -> bool:
        return run.events("step")[-1].get(key, 99) <= 2

    run.wait_for(f"an update without {name}", is_lost)
    with run.slowly():
        run.wait_for(f"{name} in the group", is_back)


def assert_ended_well(run: Run) -> dict[str, Any]:
    status, _, err = run.finish()
    assert status == 0, err
    summary = run.summary()
    assert summary["optimizer_updates"] == SETTINGS["run.updates"]
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["groups"]["in_flight"] == 0
    assert run.processes() == {}
    return summary


def gaps_s(run: Run) -> list[float]:
    """Seconds from each update to the next."""
    walls_s = [event["wall_s"] for event in run.events("step")]
    return [after - before for before, after in itertools.pairwise(walls_s)]


@pytest.mark.parametrize("victim", ["actor", "engine", "nobody"])
def test_an_actor_that_dies_or_hangs_in_mid_broadcast_costs_one_deadline(
    tmp_path: Path, victim: str
) -> None:
    with training(tmp_path) as run:
        stopped = stop_in_mid_broadcast(run, "engine", 2)
        if victim != "nobody":  # else the engine only hangs, and its own actor has to end it
            os.kill(stopped if victim == "engine" else run.child(victim, 2), signal.SIGKILL)
        num_before = len(run.events("step"))
        run.wait_for("the next update", lambda: len(run.events("step")) > num_before)
        longest_s = max(gaps_s(run))
        assert longest_s < DEADLINE_S + SLACK_S
        wait_until_back(run, "actor-2")
        summary = assert_ended_well(run)
        assert summary["weights"]["failed"] == 1
        assert summary["ledger"]["failures"]["actor lost"] >= 1
        assert summary["actors"]["actor-2.0"]["lost"]
        assert summary["actors"]["actor-2.1"]["tokens_generated"] > 0
        assert not summary["actors"]["actor-1.0"]["lost"]


def test_a_stopped_actor_costs_one_deadline_and_may_wake_up_later(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        stopped = stop_in_mid_broadcast(run, "actor", 2)
        num_before = len(run.events("step"))
        run.wait_for("five more updates", lambda: len(run.events("step")) >= num_before + 5)
        slow_s = [gap_s for gap_s in gaps_s(run) if gap_s >= DEADLINE_S]
        assert len(slow_s) == 1
        assert slow_s[0] < DEADLINE_S + SLACK_S
        os.kill(stopped, signal.SIGCONT)
        wait_until_back(run, "actor-2")
        summary = assert_ended_well(run)
        assert summary["weights"]["failed"] == 1
        assert summary["actors"]["actor-2.0"]["lost"]
        assert summary["actors"]["actor-2.1"]["tokens_generated"] > 0


def test_a_third_actor_joins_contributes_and_leaves_and_a_stopped_one_does_not_outlive_the_run(
    tmp_path: Path,
) -> None:
    with training(tmp_path) as run:
        joiner = start_actor(run)
        with run.slowly():
            run.wait_for(
                "the third", lambda: run.events("step")[-1].get("weights/lag/actor-3") == 1
            )
        present = run.events("step")[-1]
        assert (present["actors_alive"], present["actors_total"]) == (3, 3)
        run.wait_for_steps(len(run.events("step")) + 5)
        joiner.process.send_signal(signal.SIGINT)
        status, out, err = joiner.finish()
        assert (status, err) == (130, "")
        assert out.startswith(f"joined {run.address('actors join at')} as actor-3; its logs are in")
        run.wait_for("an update without it", lambda: run.events("step")[-1]["actors_alive"] == 2)
        assert run.events("step")[-1]["actors_total"] == 2
        os.kill(run.child("actor", 2), signal.SIGSTOP)
        summary = assert_ended_well(run)
        assert summary["actors"]["actor-3.0"]["leases"] > 0
        assert summary["actors"]["actor-3.0"]["tokens_generated"] > 0
        assert not summary["actors"]["actor-3.0"]["lost"]
        assert summary["actors"]["actor-2.0"]["lost"]
        assert summary["weights"]["failed"] == 1  # the stopped one's; the joiner disturbed none


def test_a_joiner_ends_with_the_run_and_says_what_keeps_it_out(tmp_path: Path) -> None:
    with training(tmp_path, run__updates=30, cluster__actors=1) as run:
        with run.slowly():
            lost = start_actor(run, "--model", "nowhere").finish()
            joiner = start_actor(run, "--run-folder", "elsewhere")
            run.wait_for("it", lambda: run.events("step")[-1].get("weights/lag/actor-3") == 1)
        assert (lost[0], len(lost[2].splitlines())) == (1, 1)
        assert lost[2].startswith("error: config field 'model.path'")
        assert "--model" in lost[2]
        status, _, err = joiner.finish()
        assert (status, err) == (0, "")
        assert (tmp_path / "elsewhere" / "logs" / "actor-3.log").is_file()
        status, _, err = run.finish()
        assert status == 0, err
        assert run.summary()["ledger"]["closes"] is True
        address = run.address("actors join at")
    command = [sys.executable, "-m", "speed_async", "actor", "--join", address, "--timeout", "1"]
    late = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert late.returncode == 1
    assert late.stderr.startswith(f"error: waited 1.0 s for a run at {address}: nobody answers")
    assert len(late.stderr.splitlines()) == 1
