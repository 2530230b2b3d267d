"""A whole run in which actors die, hang, join and leave: it continues, and its ledger balances.

Two actors train, at an IPv6 address; faults are injected into the second one. The delay of the
learner is measured from the times of the updates in metrics.jsonl.
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

from tests.fakes.paths import MODEL
from tests.fakes.run_process import Run, start_actor, start_train
from tests.fakes.slow_task import SLOW

DEADLINE_S = 3.0
SLACK_S = 20.0
"""In addition to the deadline, between the updates around a failed broadcast: half a second for the
other members to report that they are alive, a new group, an update, and machine load.
Every other wait of the run is longer than both."""
SETTINGS = {
    "learner.lr": 0.0,  # the share of prompts that pass the gate stays the same
    "cluster.host": "::1",
    "cluster.actors": 2,
    "cluster.drain_timeout_s": 5.0,
    "actors.max_restarts": 10,
    "weights.deadline_s": DEADLINE_S,
    "gate.n_init": 4,
    "gate.n_cont": 12,
    "learner.groups_per_update": 4,
}


@contextmanager
def training(folder: Path) -> Iterator[Run]:
    """A run in which all actors have weights. All its processes are killed at exit."""
    overrides = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    run = start_train(folder, *SLOW, *overrides)

    def all_have_weights() -> bool:
        last = run.events("step")[-1]
        return last["actors_alive"] == last["actors_total"] and last["weights/lag_max"] == 1

    try:
        run.wait_for_steps(2)
        run.wait_for("the last actor", all_have_weights)
        yield run
    finally:
        for process_id in run.processes():
            os.kill(process_id, signal.SIGKILL)
        run.process.kill()
        run.process.wait()


def stop_during_broadcast(run: Run, role: str, index: int) -> int:
    """Stop a process; returns its id once a broadcast waits for it.

    Broadcasts of this model take a few hundredths of a second. One that takes more than a second is
    waiting for the stopped process, and cannot end before the deadline.
    """

    def is_waiting(values: dict[str, Any]) -> bool:
        return values.get("weights/publishing_s", 0.0) > 1.0  # samples do not have it

    process_id = run.child(role, index)
    os.kill(process_id, signal.SIGSTOP)
    run.wait_for_event("a waiting broadcast", is_waiting)
    return process_id


def wait_until_back(run: Run, name: str, since: int) -> None:
    """Wait until an actor has been lost after this many updates, and has weights again that are at
    most two versions old."""
    key = f"weights/lag/{name}"

    def is_back() -> bool:
        steps = run.events("step")[since:]
        return any(key not in step for step in steps) and steps[-1].get(key, 99) <= 2

    run.wait_for(f"{name} in the group again", is_back)


def assert_drained(run: Run) -> tuple[str, dict[str, Any]]:
    """Returns what it printed, and its summary."""
    status, out, err = run.finish()
    assert status == 130, err
    summary = run.summary()
    assert summary["optimizer_updates"] == len(run.events("step"))
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["groups"]["in_flight"] == 0
    assert run.processes() == {}
    return out, summary


def gaps_s(run: Run) -> list[float]:
    """Seconds from each update to the next."""
    walls_s = [event["wall_s"] for event in run.events("step")]
    return [after - before for before, after in itertools.pairwise(walls_s)]


def delay_broadcast(run: Run, role: str, victim: str | None) -> None:
    """Stop `role` of actor 2 during a broadcast, then kill `victim` if given; check the delay."""
    num_failed = run.events("step")[-1]["weights/failed"]
    stopped = stop_during_broadcast(run, role, 2)
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
    wait_until_back(run, "actor-2", num_before)


def test_actors_die_hang_join_and_leave_and_the_run_continues(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        address = run.address("actors join at")
        delay_broadcast(run, "engine", victim="actor")
        delay_broadcast(run, "engine", victim="engine")
        delay_broadcast(run, "engine", victim=None)  # its actor has to kill it
        delay_broadcast(run, "actor", victim=None)
        assert_rejected(run, "nowhere", "error: config field 'model.path'", "--model")
        assert_rejected(
            run,
            str(with_another_tokenizer(tmp_path / "other")),
            "its model folder (fingerprint ",
            "give every node the same model, tokenizer, chat template and section [model]",
        )
        leaver = start_actor(run)
        stayer = start_actor(run, "--run-folder", "stayer")
        run.wait_for("both actors", lambda: run.events("step")[-1]["actors_alive"] == 4)
        run.wait_for("their weights", lambda: run.events("step")[-1]["weights/lag_max"] == 1)
        assert run.events("step")[-1]["actors_total"] == 4
        run.wait_for_steps(len(run.events("step")) + 5)
        leaver.process.send_signal(signal.SIGINT)
        status, out, err = leaver.finish()
        assert (status, err) == (130, "")
        assert out.startswith(f"joined {address} as actor-")
        run.wait_for("its departure", lambda: run.events("step")[-1]["actors_alive"] == 3)
        assert run.events("step")[-1]["actors_total"] == 3
        stop_during_broadcast(run, "actor", 2)
        run.interrupt()
        status, _, err = stayer.finish()
        assert (status, err) == (0, "")
        out, summary = assert_drained(run)
        check_warnings(out)
        check_actors(summary)
        assert list((tmp_path / "stayer" / "logs").glob("actor-?.log"))
    assert_no_reply(address)


def check_warnings(out: str) -> None:
    warned = [line for line in out.splitlines() if line.startswith("warning actor-2")]
    assert warned, out
    assert not any(".cc:" in line for line in warned)


def check_actors(summary: dict[str, Any]) -> None:
    # Of the injected faults and of the actor that was stopped at the end; joins caused none.
    assert summary["weights"]["failed"] == 5
    assert summary["ledger"]["failures"]["actor lost"] >= 5
    actors = summary["actors"]
    lost = [name for name, actor in actors.items() if actor["lost"]]
    assert lost == [f"actor-2.{incarnation}" for incarnation in range(5)]
    assert actors["actor-2.4"]["tokens_generated"] > 0  # the others may have been stopped before
    joined = [actor for name, actor in actors.items() if name > "actor-3"]
    assert len(joined) == 2
    for actor in joined:
        assert actor["leases"] > 0
        assert actor["tokens_generated"] > 0


def with_another_tokenizer(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    return folder


def assert_rejected(run: Run, model: str, *texts: str) -> None:
    """An actor with this model cannot join, and its error names the reason in one line."""
    status, _, err = start_actor(run, "--model", model).finish()
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ")
    assert all(text in err for text in texts), err


def assert_no_reply(address: str) -> None:
    command = [sys.executable, "-m", "speed_async", "actor", "--join", address, "--timeout", "1"]
    late = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert late.returncode == 1
    assert late.stderr.startswith(f"error: waited 1.0 s for a run at {address}: no reply")
    assert len(late.stderr.splitlines()) == 1
