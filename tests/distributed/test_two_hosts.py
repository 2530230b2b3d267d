"""Whole runs on two hosts whose link is slow, loses packets and fails."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from speed_async.config.sections.cluster import ClusterConfig
from speed_async.launcher.exit_status import EXIT_RUN_LOST
from speed_async.transport.key_making import make_keys
from tests.fakes.network_hosts import Host, Hosts, obstacle, two_hosts
from tests.fakes.run_process import Run, start, train_command, write_config
from tests.fakes.slow_task import SLOW

DELAY_S, LOSS = 0.05, 0.01
"""One way, and in each direction."""
CUT_S = 20.0
GROUPS, COMPLETIONS = 2, 8
"""Per update."""

pytestmark = pytest.mark.multinode


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := obstacle():
        pytest.skip(reason)
    with two_hosts() as made:
        made.set_link(delay_s=DELAY_S, loss=LOSS)
        yield made


def start_nodes(folder: Path, hosts: list[Host], *overrides: str) -> list[Run]:
    """Start node K, which has one rank, on `hosts[K]`. The first two ranks are learners, the
    others actors. Returns the nodes by rank."""
    make_keys(folder / "keys")
    host = hosts[0]
    options = ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--cluster.learners", "2"]
    options += ["--cluster.host", host.address, "--cluster.keys", str(folder / "keys")]
    options += ["--cluster.service_port", str(host.free_port())]
    options += ["--cluster.learner_port", str(host.free_port())]
    options += ["--run.folder", str(folder / "run"), *SLOW, *overrides]
    nodes = []
    for rank, own in enumerate(hosts):
        node_folder = folder / f"node-{rank}"
        node_folder.mkdir()
        command = train_command(write_config(node_folder), *options, "--node-rank", str(rank))
        node = start(node_folder, [*own.enter, *command])
        nodes.append(Run(process=node.process, folder=folder / "run"))
    return nodes


def end_all(nodes: list[Run]) -> None:
    for node in nodes:
        node.kill()


def disappear(hosts: Hosts, host: Host) -> None:
    """The host goes for good: its connections are not closed, they fall silent."""
    hosts.cut()
    host.kill()


def test_run_continues_without_a_host_that_disappears(tmp_path: Path, hosts: Hosts) -> None:
    here, there = hosts.first, hosts.second
    layout = [here, here, here, there]
    nodes = first, _, actor, _ = start_nodes(tmp_path, layout, "--cluster.peer_timeout_s", "10")
    try:
        first.wait_for("both actors", lambda: actors(first) == 2)
        disappear(hosts, there)
        first.wait_for("the loss of one", lambda: actors(first) == 1)
        first.wait_for_version(first.versions()[-1] + 3)
        first.interrupt()
        status, _, err = first.finish()
        assert status == 130, err
        assert actor.finish()[0] == 130
        assert nodes[1].finish()[0] == 0
        assert_nothing_lost(first)
        assert first.summary()["actors"]["actor-3.0"]["lost"]
        assert hosts.first.processes() == []
    finally:
        end_all(nodes)


@pytest.mark.slow
def test_run_survives_a_cut_link_and_resumes_without_a_host_of_a_learner(
    tmp_path: Path, hosts: Hosts
) -> None:
    here, there = hosts.first, hosts.second
    nodes = first, *_ = start_nodes(tmp_path, [here, there, here, there])
    assert ClusterConfig().peer_timeout_s / 2 > CUT_S
    try:
        first.wait_for("both actors", lambda: actors(first) == 2)
        first.wait_for_steps(2)
        hosts.cut()
        time.sleep(CUT_S)
        hosts.heal()
        first.wait_for_version(first.versions()[-1] + 3)
        for event in first.events("step"):
            assert event["ledger_closes"] is True
            assert (event["groups_failed"], event["warning"]) == (0, "")
        assert actors(first) == 2
        assert [node.process.poll() for node in nodes] == [None] * 4

        disappear(hosts, there)
        status, _, err = first.finish()
        assert status == 1, err
        message = "learner-1: sent nothing for 60 s; see logs/learner-1.log"
        assert err.splitlines()[-1] == f"error: {message}"
        assert first.events("end")[0]["reason"] == f"learner: {message}"
        assert nodes[2].finish()[0] == 1
        assert hosts.first.processes() == []

        updates = str(first.versions()[-1] + 2)
        command = [sys.executable, "-m", "speed_async", "train", "--resume", str(first.folder)]
        command += ["--run.updates", updates]
        command += ["--cluster.learners", "1", "--cluster.actors", "1"]
        resumed = start(first.folder.parent, [*here.enter, *command])
        nodes.append(resumed)
        status, _, err = resumed.finish()
        assert status == 0, err
        assert sorted(set(resumed.versions())) == list(range(1, int(updates) + 1))
        assert_nothing_lost(resumed)
    finally:
        end_all(nodes)


@pytest.mark.slow
def test_nodes_exit_when_the_host_of_the_first_learner_disappears(
    tmp_path: Path, hosts: Hosts
) -> None:
    here, there = hosts.first, hosts.second
    layout = [here, there, here, there]
    nodes = first, learner, _, actor = start_nodes(
        tmp_path, layout, "--cluster.peer_timeout_s", "10"
    )
    try:
        first.wait_for_steps(1)
        disappear(hosts, here)
        status, _, err = learner.finish()
        assert status == 1
        message = "learner (rank 0): has exited or cannot be reached"
        assert err.splitlines()[-1] == f"error: {message}: nothing received for 10 s"
        status, _, err = actor.finish()
        assert status == EXIT_RUN_LOST
        assert err.splitlines()[-1].startswith("error: actor-3: lost the run: no event from")
        assert there.processes() == []
    finally:
        end_all(nodes)


def actors(run: Run) -> int:
    """Connected actors at the last update."""
    return next((event["actors_alive"] for event in run.events("step")[::-1]), 0)


def assert_nothing_lost(run: Run) -> None:
    """Every group that the service accepted was trained once, or is still in the journal."""
    run.assert_saved()
    summary = run.summary()
    assert summary["ledger"]["checks"] == dict.fromkeys(summary["ledger"]["checks"], True)
    trained = summary["optimizer_updates"]
    assert summary["optimizer_updates"] + summary["skipped_updates"] == summary["policy_version"]
    assert summary["ledger"]["groups"]["trained"] == GROUPS * trained
    assert summary["completions_trained"] == COMPLETIONS * trained
