"""The exchange between ranks, each in a thread of this process with a store on loopback."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from speed_async.launcher.doctor.exchange import exchange
from speed_async.launcher.doctor.records import GLOO, Exchange, RankJob

SHORT_S = 2.0
"""Timeout of ranks that wait for one that does not come."""
JOB = RankJob(
    rank=0,
    world_size=2,
    local_rank=0,
    local_world_size=1,
    host="127.0.0.1",
    port=0,
    timeout_s=60.0,
    parent_id=0,
)


def run_all(jobs: Sequence[RankJob]) -> list[Exchange]:
    """Run the jobs concurrently; those of rank 0 serve the store."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    jobs = [replace(job, port=port) for job in jobs]
    jobs = [
        job if job.rank else replace(job, listener=listener.detach())  # the store closes it
        for job in jobs
    ]
    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: exchange(job, lambda stage: None), jobs))


def ranks(*numbers: int, **change: object) -> list[RankJob]:
    return [replace(JOB, rank=rank, **change) for rank in numbers]


def test_all_ranks_know_the_same_facts_and_measurements() -> None:
    first, second, third = run_all(ranks(0, 1, 2, world_size=3))
    assert first == second == third
    assert (first.fault, first.missing, first.silent) == (None, [], [])
    assert [each.rank for each in first.facts] == [0, 1, 2]
    leader, *others = first.reports
    assert (leader.round_trip_s, leader.clock_offset_s) == (None, None)
    for report in others:
        assert report.faults == {}
        assert report.round_trip_s is not None and report.clock_offset_s is not None
        # One clock: what the measurement may err by.
        assert abs(report.clock_offset_s) <= report.round_trip_s / 2 + 0.001
        assert report.all_reduce_s[GLOO] > 0


def test_rank_that_does_not_come_is_named_to_the_others() -> None:
    for result in run_all(ranks(0, 2, world_size=3, timeout_s=SHORT_S)):
        assert (result.missing, result.fault) == ([1], None)
        assert [each.rank for each in result.facts] == [0, 2]
        assert result.reports == []


def test_one_rank_alone_measures_nothing() -> None:
    [result] = run_all(ranks(0, world_size=1))
    assert (result.fault, result.missing) == (None, [])
    assert result.reports[0].all_reduce_s == {}


def test_two_processes_with_one_rank_are_refused() -> None:
    results = run_all(ranks(0, 1, 1))
    [fault] = [result.fault for result in results if result.fault is not None]
    assert fault.startswith("two processes have rank 1: give every node its own --node-rank")


def test_nodes_of_different_runs_are_refused() -> None:
    first, second = ranks(0, 1)
    first, second = run_all([first, replace(second, world_size=3)])
    assert str(first.fault).startswith("node 1 was started for 3 ranks, and this one for 2: give ")
    assert str(second.fault).startswith("node 0 was started for 2 ranks, and this one for 3: give ")


@pytest.mark.parametrize("is_shared", [True, False])
def test_file_of_rank_0_is_looked_for_in_the_folder_of_each_node(
    tmp_path: Path, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speed_async.launcher.doctor.exchange.SHARED_FILE_S", 0.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "other").mkdir()
    first, second = ranks(0, 1)
    folder = tmp_path / ("mine" if is_shared else "other")
    first = replace(first, shared_folder=str(tmp_path / "mine"), shared_file="file")
    result, _ = run_all([first, replace(second, shared_folder=str(folder))])
    assert [each.sees_shared_file for each in result.reports] == [True, is_shared]


def test_a_name_with_folders_is_looked_for_in_the_folder_only(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "secret").touch()
    outside = str(tmp_path / "elsewhere" / "secret")
    [result] = run_all(
        ranks(0, world_size=1, shared_folder=str(tmp_path / "runs"), shared_file=outside)
    )
    assert result.reports[0].sees_shared_file is True
