"""What is reported of the facts and measurements of several nodes."""

from dataclasses import replace

import pytest

from speed_async.launcher.doctor.comparison import (
    compare_nodes,
    missing_ranks,
    show_gpus,
    show_links,
)
from speed_async.launcher.doctor.records import (
    GLOO,
    NCCL,
    Exchange,
    Gpu,
    RankFacts,
    RankJob,
    RankReport,
)
from speed_async.launcher.preflight.findings import Findings

VERSIONS = {"speed_async": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "vllm": "0.32.0"}
INPUTS = {"model": "aaaa", "data": "bbbb"}


def facts(rank: int, *, per_node: int = 1, **change: object) -> RankFacts:
    """Facts of a rank on a node of its own, or one of `per_node`."""
    node = rank // per_node
    each = RankFacts(
        rank=rank,
        node=node,
        world_size=2 * per_node,
        host_name=f"host-{node}",
        versions=VERSIONS,
        inputs=INPUTS,
    )
    return replace(each, **change)


def compare(second: RankFacts) -> Findings:
    findings = Findings()
    compare_nodes([facts(0), second], findings)
    return findings


@pytest.mark.parametrize("name", ["speed_async", "torch", "NCCL"])
def test_versions_that_must_agree_are_an_error_that_names_both_nodes(name: str) -> None:
    mine = facts(0, versions=VERSIONS | {name: "1.0"})
    findings = Findings()
    compare_nodes([mine, facts(1, versions=VERSIONS | {name: "2.0"})], findings)
    [error] = map(str, findings.errors)
    assert f"{name} differs between nodes: 1.0 on node 0 (host-0), 2.0 on node 1 (host-1)" in error
    assert "install the same version on all nodes" in error
    assert findings.warnings == []


@pytest.mark.parametrize(
    ("versions", "warning"),
    [
        ({"torch": "2.13.0+cu128"}, "different builds of one release"),
        ({"python": "3.12.1"}, "python differs between nodes"),
        ({"vllm": "not installed"}, None),
        ({"NCCL": "2.27.3"}, None),
        ({}, None),
    ],
)
def test_differences_that_may_work_are_warnings(
    versions: dict[str, str], warning: str | None
) -> None:
    findings = compare(facts(1, versions=VERSIONS | versions))
    assert findings.errors == []
    assert len(findings.warnings) == (warning is not None)
    assert all(str(warning) in found for found in findings.warnings)


def test_other_model_or_data_is_an_error_unless_a_node_could_not_read_it() -> None:
    findings = compare(facts(1, inputs={"model": "cccc", "data": "bbbb"}))
    [error] = map(str, findings.errors)
    assert "model differs between nodes: aaaa on node 0" in error
    assert "copy the same files to all nodes, or correct model.path" in error
    assert compare(facts(1, inputs={})).errors == []


JOB = RankJob(
    rank=0,
    world_size=6,
    local_rank=0,
    local_world_size=2,
    host="10.0.0.1",
    port=29411,
    timeout_s=30,
    parent_id=1,
)


def test_missing_nodes_are_named_with_what_to_start_and_which_port_to_open() -> None:
    missing = [1, 2, 4, 5]  # an own rank whose process failed, a rank of node 1, and node 2
    first, second = missing_ranks(Exchange(missing=missing), JOB, num_nodes=3, failed=[1])
    assert first.startswith("rank 2 on node 1 did not answer within 30 s")
    assert second == (
        "2 of 3 nodes answered within 30 s: node 2 is missing; start `speed-async doctor ... "
        "--node-rank 2` there with the other arguments as here, and open port 29411 from it to "
        "10.0.0.1"
    )


def test_rank_that_came_too_late_is_an_error_on_its_own_node() -> None:
    [late] = missing_ranks(Exchange(missing=[1]), JOB, num_nodes=3)
    assert late.startswith("rank 1 on this node did not reach rank 0 within 30 s")
    assert late.endswith("or set a longer --timeout")


def report(rank: int, **change: object) -> RankReport:
    each = RankReport(
        rank=rank,
        round_trip_s=0.001 if rank else None,
        clock_offset_s=0.002 if rank else None,
        all_reduce_s={GLOO: 0.01 * (rank + 1)},
    )
    return replace(each, **change)


def links(second: RankReport, **change: object) -> Findings:
    findings = Findings()
    exchange = Exchange(facts=[facts(0), facts(1)], reports=[report(0), second])
    show_links(replace(exchange, **change), findings, folder="/runs")
    return findings


def test_measurements_are_shown_in_one_line_per_backend_and_node() -> None:
    findings = links(report(1, sees_shared_file=True))
    assert (findings.errors, findings.warnings) == ([], [])
    assert findings.sections == [
        (
            "ranks",
            [
                "2 ranks on 2 nodes",
                "node 0: host-0",
                "node 1: host-1, clock +2.00 ms (within 0.50 ms) from node 0",
                "gloo: all-reduce of 16.0 MiB in 20.0 ms (0.84 GB/s), round trip to rank 0 at "
                "most 1.00 ms (rank 1)",
                "NCCL: not measured, not every rank has a GPU of its own",
                "run folder: shared by all nodes with learners ('/runs' here)",
            ],
        )
    ]


@pytest.mark.parametrize(("offset_s", "warns"), [(-1.2, True), (1.2, True), (0.9, False)])
def test_clock_that_differs_by_more_than_a_second_is_a_warning(
    offset_s: float, warns: bool
) -> None:
    warnings = links(report(1, clock_offset_s=offset_s)).warnings
    assert [f"differs by {offset_s:+.1f} s" in each for each in warnings] == [True] * warns


def test_offset_that_the_round_trip_may_explain_is_no_warning() -> None:
    assert links(report(1, clock_offset_s=1.2, round_trip_s=0.5)).warnings == []


def test_failed_backend_is_one_error_with_the_first_cause() -> None:
    faults = {"gloo": "the connection was closed by the peer"}
    findings = links(report(1, all_reduce_s={}, faults=faults))
    [error] = map(str, findings.errors)
    assert error.startswith("gloo failed on rank 1 (the connection was closed by the peer)")
    assert "allow all TCP ports between the nodes" in error
    assert "  gloo: failed" in [f"  {line}" for line in findings.sections[0][1]]


def test_run_folder_that_other_learners_cannot_see_is_an_error() -> None:
    exchange = Exchange(
        facts=[facts(0), facts(1)],
        reports=[report(0, sees_shared_file=True), report(1, sees_shared_file=False)],
    )
    findings = Findings()
    show_links(exchange, findings, folder="/runs")
    [error] = map(str, findings.errors)
    assert error.startswith("rank 1 cannot see a file that rank 0 made for this test beside run.")
    assert not any("run folder" in line for line in findings.sections[0][1])


def test_rank_that_stopped_reporting_is_an_error() -> None:
    [error] = map(str, links(report(1), silent=[1], reports=[report(0)]).errors)
    assert error.startswith("rank 1 connected and then did not report")


def test_nccl_is_shown_where_each_rank_has_a_gpu() -> None:
    own = {"has_own_gpu": True}
    reports = [report(rank, all_reduce_s={GLOO: 0.01, NCCL: 0.001}) for rank in (0, 1)]
    findings = Findings()
    exchange = Exchange(facts=[facts(0, **own), facts(1, **own)], reports=reports)
    show_links(exchange, findings, folder=None)
    assert "NCCL: all-reduce of 128.0 MiB in 1.0 ms (134.22 GB/s)" in findings.sections[0][1]


def test_gpus_of_all_nodes_are_listed() -> None:
    gpu = Gpu(
        name="H200",
        free_bytes=100 << 30,
        total_bytes=139 << 30,
        capability="9.0",
        has_bfloat16=True,
    )
    findings = Findings()
    show_gpus([facts(0), facts(1, gpus=[gpu])], findings)
    line = "node 1 GPU 0: H200, 100.0 GiB free of 139.0 GiB, compute capability 9.0, bfloat16"
    assert findings.sections == [("GPUs", [line])]
