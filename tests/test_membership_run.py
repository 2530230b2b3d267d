"""Whole runs in which actors die, hang, come and go: the run goes on, and its books close.

Two actors train; something happens to the second one. What it costs the learner is read off the
times of the updates in metrics.jsonl.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run_process import MODEL, Run, start_actor, start_train

DEADLINE_S = 3.0
SLACK_S = 3.0
"""On top of the deadline, between the updates that a failed broadcast lies between: half a second
for the others to say that they live, a new group, an update, and a machine with much to do."""
SETTINGS = {
    "run.updates": 80,
    "cluster.actors": 2,
    "weights.deadline_s": DEADLINE_S,
    "gate.n_init": 4,
    "gate.n_cont": 12,
    "learner.groups_per_update": 8,
}


@contextmanager
def training(folder: Path) -> Iterator[Run]:
    """A run in which all actors have weights; whatever the test does, it leaves no process."""
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    run = start_train(folder, *words)

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


def hold_up(run: Run, role: str, victim: str | None) -> None:
    """Actor 2 holds up a broadcast, `victim` of it is killed if any; checks what that costs."""
    num_failed = run.events("step")[-1]["weights/failed"]
    stopped = stop_in_mid_broadcast(run, role, 2)
    if victim is not None:
        os.kill(stopped if victim == role else run.child(victim, 2), signal.SIGKILL)
    num_before = len(run.events("step"))
    run.wait_for("three more updates", lambda: len(run.events("step")) >= num_before + 3)
    longest_s, *others_s = sorted(gaps_s(run)[num_before - 1 :], reverse=True)
    assert 1.0 < longest_s < DEADLINE_S + SLACK_S
    assert max(others_s) < DEADLINE_S
    assert run.events("step")[-1]["weights/failed"] == num_failed + 1
    if role == "actor":
        os.kill(stopped, signal.SIGCONT)
    wait_until_back(run, "actor-2")


def test_an_actor_or_its_engine_killed_in_mid_broadcast_costs_one_deadline_at_most(
    tmp_path: Path,
) -> None:
    with training(tmp_path) as run:
        hold_up(run, "engine", victim="actor")
        hold_up(run, "engine", victim="engine")
        summary = assert_ended_well(run)
        assert summary["weights"]["failed"] == 2
        assert summary["ledger"]["failures"]["actor lost"] >= 2
        actors = summary["actors"]
        lost = [name for name, what in actors.items() if what["lost"]]
        assert lost == ["actor-2.0", "actor-2.1"]
        assert actors["actor-2.2"]["tokens_generated"] > 0


def test_an_actor_or_its_engine_that_hangs_costs_one_deadline_and_may_wake_up_later(
    tmp_path: Path,
) -> None:
    with training(tmp_path) as run:
        hold_up(run, "engine", victim=None)  # its own actor has to end it
        hold_up(run, "actor", victim=None)
        summary = assert_ended_well(run)
        assert summary["weights"]["failed"] == 2
        actors = summary["actors"]
        lost = [name for name, what in actors.items() if what["lost"]]
        assert lost == ["actor-2.0", "actor-2.1"]
        assert actors["actor-2.2"]["tokens_generated"] > 0


def test_actors_join_contribute_and_leave_and_a_stopped_one_does_not_outlive_the_run(
    tmp_path: Path,
) -> None:
    with training(tmp_path) as run:
        address = run.address("actors join at")
        with run.slowly():
            refused = start_actor(run, "--model", "nowhere")
            status, _, err = refused.finish()
            assert (status, len(err.splitlines())) == (1, 1)
            assert err.startswith("error: config field 'model.path'")
            assert "--model" in err
            leaver = start_actor(run)
            stayer = start_actor(run, "--run-folder", "stayer")
            run.wait_for("both", lambda: run.events("step")[-1]["actors_alive"] == 4)
            run.wait_for("their weights", lambda: run.events("step")[-1]["weights/lag_max"] == 1)
        assert run.events("step")[-1]["actors_total"] == 4
        run.wait_for_steps(len(run.events("step")) + 5)
        leaver.process.send_signal(signal.SIGINT)
        status, out, err = leaver.finish()
        assert (status, err) == (130, "")
        assert out.startswith(f"joined {address} as actor-")
        run.wait_for("an update without it", lambda: run.events("step")[-1]["actors_alive"] == 3)
        assert run.events("step")[-1]["actors_total"] == 3
        os.kill(run.child("actor", 2), signal.SIGSTOP)
        status, _, err = stayer.finish()
        assert (status, err) == (0, "")
        summary = assert_ended_well(run)
        joined = [what for name, what in summary["actors"].items() if name > "actor-3"]
        assert len(joined) == 2
        for what in joined:
            assert what["leases"] > 0
            assert what["tokens_generated"] > 0
            assert not what["lost"]
        assert summary["actors"]["actor-2.0"]["lost"]
        assert summary["weights"]["failed"] == 1  # the stopped one's: joining disturbed nobody
        assert list((tmp_path / "stayer" / "logs").glob("actor-?.log"))
    assert_nobody_answers(address)


def test_an_actor_of_another_tokenizer_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    run = start_train(tmp_path, "--run.updates", "100000")
    run.wait_for_steps(1)
    status, _, err = start_actor(run, "--model", str(other)).finish()
    assert status == 1
    assert "its model folder (fingerprint " in err
    assert "give every node the same model, tokenizer and chat template" in err
    assert len(err.splitlines()) == 1
    run.wait_for_steps(len(run.events("step")) + 1)
    run.interrupt()
    assert run.finish()[0] == 130


def assert_nobody_answers(address: str) -> None:
    command = [sys.executable, "-m", "speed_async", "actor", "--join", address, "--timeout", "1"]
    late = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert late.returncode == 1
    assert late.stderr.startswith(f"error: waited 1.0 s for a run at {address}: nobody answers")
    assert len(late.stderr.splitlines()) == 1
