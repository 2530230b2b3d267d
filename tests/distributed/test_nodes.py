"""Runs of several nodes (all on this machine), each started by `speed-async train`."""

import os
import signal
import time
from pathlib import Path

import pytest

from speed_async.launcher.exit_status import EXIT_RUN_LOST, EXIT_STATUS
from speed_async.transport.key_making import make_keys
from tests.fakes.run_process import Run, free_port, own_address, start_torchrun, start_train
from tests.fakes.slow_task import SLOW

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(
        own_address() == "127.0.0.1", reason="this machine has only loopback addresses"
    ),
]

PEER_TIMEOUT_S = 5.0


def start_nodes(folder: Path, count: int, *overrides: str) -> list[Run]:
    """Start the learner's node and `count` - 1 nodes with one actor each; returns them by rank."""
    make_keys(folder / "keys")
    host = own_address()
    options = ["--nnodes", str(count), "--nproc-per-node", "1"]
    options += ["--cluster.host", host, "--cluster.keys", str(folder / "keys")]
    options += ["--cluster.service_port", str(free_port(host))]
    options += ["--cluster.peer_timeout_s", str(PEER_TIMEOUT_S), *SLOW, *overrides]
    nodes = []
    for rank in reversed(range(count)):  # the actors' nodes first: they wait for the learner's node
        node_folder = folder / f"node-{rank}"
        node_folder.mkdir()
        node = start_train(
            node_folder, *options, "--run.folder", str(folder / "run"), "--node-rank", str(rank)
        )
        nodes.append(Run(process=node.process, folder=folder / "run"))
    return nodes[::-1]


def kill_node(run: Run, rank: int) -> None:
    """Kill all processes of a node at once, like a power failure."""
    run.process.kill()
    commands = run.processes()
    node_folder = f"{run.folder.parent}/node-{rank}/"
    ranks = {one for one, command in commands.items() if node_folder in command}
    parents = tuple(f" --parent {one} " for one in ranks)
    children = {one for one, c in commands.items() if any(parent in c for parent in parents)}
    for process_id in ranks | children:
        os.kill(process_id, signal.SIGKILL)


def wait_for_actors(run: Run, count: int) -> None:
    run.wait_for(
        f"an update with {count} actors",
        lambda: [event["actors_alive"] for event in run.events("step")][-1:] == [count],
    )


def end_all(nodes: list[Run]) -> None:
    for node in nodes:
        node.kill()


def test_run_continues_without_a_killed_node_and_each_other_one_reports_the_outcome_last(
    tmp_path: Path,
) -> None:
    nodes = start_nodes(tmp_path, 3, "--weights.deadline_s", "5")
    first, killed, other = nodes
    try:
        first.wait_for_steps(1)
        wait_for_actors(first, 2)
        kill_node(killed, 1)
        wait_for_actors(first, 1)
        first.wait_for_version(first.versions()[-1] + 20)
        first.interrupt()
        status, _, err = first.finish()
        assert status == 130
        assert err.splitlines()[-1].startswith("stopped by SIGINT; to resume: ")
        status, out, err = other.finish()
        outcome = first.events("end")[-1].get("outcome", "completed")
        assert (status, out) == (EXIT_STATUS[outcome], "")
        assert err.splitlines()[-1] == f"the run has ended on node 0: {outcome}"
        summary = first.summary()
        assert summary["ledger"]["closes"] is True
        assert summary["optimizer_updates"] >= 20
        assert first.processes() == {}
    finally:
        end_all(nodes)


def test_node_that_lost_the_run_exits_and_reports_it(tmp_path: Path) -> None:
    nodes = first, second = start_nodes(tmp_path, 2)
    try:
        wait_for_actors(first, 1)
        kill_node(first, 0)
        began_s = time.monotonic()
        status, _, err = second.finish()
        assert status == EXIT_RUN_LOST
        assert time.monotonic() - began_s < PEER_TIMEOUT_S + 40  # 40 s to stop its actors
        assert err.splitlines()[-1].startswith("error: actor-")
        assert "lost the run: no event from the metrics feed at tcp://" in err
        # A service that starts slowly is reported.
        others = [line for line in err.splitlines()[:-1] if "has not replied" not in line]
        assert others == ["preflight checks passed"]
        assert second.processes() == {}
    finally:
        end_all(nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2"], "config field 'cluster.host' = '127.0.0.1': this run has several"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: nodes are numbered from 0 to 1"),
        (["--nnodes", "3"], "2 ranks cannot be divided evenly among --nnodes 3"),
        (["--nproc-per-node", "1"], "config field 'cluster.learners' = 1: leaves no rank for an"),
    ],
)
def test_invalid_nodes_are_rejected_before_any_rank_starts(
    tmp_path: Path, options: list[str], message: str
) -> None:
    run = start_train(tmp_path, *options)
    status, _, err = run.finish()
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not run.folder.exists()


def test_several_nodes_require_a_fixed_service_port(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    run = start_train(
        tmp_path,
        *("--nnodes", "2", "--nproc-per-node", "2", "--cluster.host", own_address()),
        *("--cluster.keys", "keys"),
    )
    status, _, err = run.finish()
    assert status == 1
    assert err.startswith("error: config field 'cluster.service_port' = 0: this run has several")


def test_torchrun_on_two_nodes_trains_with_learner_ranks_on_both(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    host = own_address()
    options = ["--cluster.learners", "3", "--cluster.host", host]
    options += ["--cluster.keys", str(tmp_path / "keys")]
    options += ["--cluster.service_port", str(free_port(host))]
    options += ["--cluster.learner_port", str(free_port(host))]
    options += ["--run.folder", str(tmp_path / "run"), "--run.updates", "3"]
    agents = ["--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}"]
    nodes = []
    for name in ("node-a", "node-b"):
        (tmp_path / name).mkdir()
        node = start_torchrun(tmp_path / name, 2, *options, torchrun=agents)
        nodes.append(Run(process=node.process, folder=tmp_path / "run"))
    try:
        ends = [node.finish() for node in nodes]
        assert [status for status, _, _ in ends] == [0, 0], [err for _, _, err in ends]
        run = nodes[0]
        assert run.summary()["optimizer_updates"] == 3
        training = run.folder / "checkpoints/version-000003/training"
        assert len([*training.glob("weights-*-of-00003.tensors")]) == 3
    finally:
        end_all(nodes)
