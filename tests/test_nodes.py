"""Runs of two nodes (both on this machine), started by `speed-async train` on each of them."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from run_process import Run, own_address, start_train

from speed_async.launcher.exit_status import EXIT_LOST_RUN, EXIT_STATUS
from speed_async.transport.key_making import make_keys

pytestmark = [
    pytest.mark.skipif(
        own_address() == "127.0.0.1", reason="this machine has no address but loopback"
    ),
]

FOR_EVER = ("--run.updates", "100000")
PEER_TIMEOUT_S = 5.0


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def start_nodes(folder: Path, *overrides: str) -> tuple[Run, Run]:
    """The learner's node, and one of an actor. Each rank of theirs has its own actor."""
    make_keys(folder / "keys")
    host = own_address()
    options = ["--nnodes", "2", "--nproc-per-node", "2"]
    options += ["--cluster.host", host, "--cluster.keys", str(folder / "keys")]
    options += ["--cluster.service_port", str(free_port(host))]
    options += ["--cluster.peer_timeout_s", str(PEER_TIMEOUT_S), *overrides]
    nodes = []
    for rank in (1, 0):  # the one that has to wait comes first
        place = folder / f"node-{rank}"
        place.mkdir()
        one = start_train(
            place, *options, "--run.folder", str(folder / "run"), "--node-rank", str(rank)
        )
        nodes.append(Run(process=one.process, folder=folder / "run"))
    return nodes[1], nodes[0]


def kill_node(run: Run, rank: int) -> None:
    """What becomes of a node whose power goes: all its processes, and nobody is told."""
    run.process.kill()
    everybody = run.processes()
    place = f"{run.folder.parent}/node-{rank}/"
    ranks = {one for one, command in everybody.items() if place in command}
    parents = tuple(f" --parent {one} " for one in ranks)
    children = {one for one, c in everybody.items() if any(parent in c for parent in parents)}
    for process_id in ranks | children:
        os.kill(process_id, signal.SIGKILL)


def wait_for_all(run: Run) -> None:
    run.wait_for(
        "all actors", lambda: any(event["actors_alive"] == 3 for event in run.events("step"))
    )


def end_all(*nodes: Run) -> None:
    for node in nodes:
        node.kill()


def test_two_nodes_train_and_each_says_at_last_how_it_ended(tmp_path: Path) -> None:
    first, second = start_nodes(tmp_path, *FOR_EVER)
    try:
        wait_for_all(first)
        first.interrupt()
        status, _, err = first.finish()
        assert status == 130
        assert err.splitlines()[-1].startswith("stopped by SIGINT; to go on: ")
        status, out, err = second.finish()
        outcome = first.events("end")[-1].get("outcome", "completed")
        assert (status, out) == (EXIT_STATUS[outcome], "")
        assert err.splitlines()[-1] == f"the run has ended on node 0: {outcome}"
        assert first.summary()["ledger"]["closes"] is True
        assert first.processes() == {}
    finally:
        end_all(first, second)


def test_a_node_that_vanishes_takes_no_completed_run_with_it(tmp_path: Path) -> None:
    first, second = start_nodes(tmp_path, "--run.updates", "150", "--weights.deadline_s", "5")
    try:
        first.wait_for_steps(1)
        with first.slowly():
            wait_for_all(first)
        kill_node(second, 1)
        status, _, err = first.finish()
        assert status == 0, err
        summary = first.summary()
        assert (summary["completed"], summary["optimizer_updates"]) == (True, 150)
        assert summary["ledger"]["closes"] is True
    finally:
        end_all(first, second)


def test_a_node_that_has_lost_the_run_ends_by_itself_and_says_so(tmp_path: Path) -> None:
    first, second = start_nodes(tmp_path, *FOR_EVER)
    try:
        wait_for_all(first)
        kill_node(first, 0)
        began_s = time.monotonic()
        status, _, err = second.finish()
        assert status == EXIT_LOST_RUN
        assert time.monotonic() - began_s < PEER_TIMEOUT_S + 40  # to end its actors' processes
        assert err.splitlines()[-1].startswith("error: actor-")
        assert "lost the run: nothing was heard of the metrics feed at tcp://" in err
        assert err.splitlines()[:-1] == ["checked: nothing is wrong"]
        assert second.processes() == {}
    finally:
        end_all(first, second)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nnodes", "2"], "config field 'cluster.host' = '127.0.0.1': this run has several"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: nodes are numbered from 0 to 1"),
        (["--nnodes", "3"], "2 ranks cannot be shared evenly by --nnodes 3"),
        (["--nproc-per-node", "1"], "config field 'cluster.learners' = 1: leaves no rank for an"),
    ],
)
def test_nodes_that_could_not_work_are_refused_before_anything_starts(
    tmp_path: Path, options: list[str], said: str
) -> None:
    run = start_train(tmp_path, *options)
    status, _, err = run.finish()
    assert status == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not run.folder.exists()


def test_several_nodes_need_a_port_that_all_of_them_know(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    run = start_train(
        tmp_path,
        *("--nnodes", "2", "--nproc-per-node", "2", "--cluster.host", own_address()),
        *("--cluster.keys", "keys"),
    )
    status, _, err = run.finish()
    assert status == 1
    assert err.startswith("error: config field 'cluster.service_port' = 0: this run has several")
