"""Compares what the ranks of all nodes know. Pure: facts in, findings out."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from speed_async.errors import SpeedAsyncError
from speed_async.launcher.doctor.records import (
    ALL_REDUCE_BYTES,
    GLOO,
    NCCL,
    Exchange,
    Gpu,
    RankFacts,
    RankJob,
    RankReport,
)
from speed_async.launcher.doctor.versions import ABSENT
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.machine import size
from speed_async.observability.notation import counted

MUST_AGREE = ("speed_async", "torch", "NCCL")
SHOULD_AGREE = ("python", "transformers", "vllm")
MAX_OFFSET_S = 1.0
OPTIONS = {"model": "model.path", "data": "task.path"}
"""Fields that name the inputs whose digests are compared."""


def compare_nodes(facts: Sequence[RankFacts], findings: Findings) -> None:
    """Compare the first ranks of the nodes: versions and inputs."""
    nodes = _first_ranks(facts)
    for name in MUST_AGREE:
        if text := _difference(name, nodes, lambda each, name=name: _release(each, name)):
            package = "" if name == "NCCL" else f" (pip install {name}==VERSION)"
            remedy = f"{text}; install the same version on all nodes{package}"
            findings.errors.append(SpeedAsyncError(remedy))
    one_release = len({_release(each, "torch") for each in nodes}) == 1
    if one_release and (
        text := _difference("torch", nodes, lambda each: each.versions.get("torch"))
    ):
        findings.warnings.append(f"{text}: different builds of one release")
    for name in SHOULD_AGREE:
        if text := _difference(name, nodes, lambda each, name=name: _release(each, name)):
            findings.warnings.append(f"{text}: use the same version on all nodes")
    for name, option in OPTIONS.items():
        if text := _difference(name, nodes, lambda each, name=name: each.inputs.get(name)):
            findings.errors.append(
                SpeedAsyncError(
                    f"{text}; copy the same files to all nodes, or correct {option} on one of them"
                )
            )


def show_gpus(facts: Sequence[RankFacts], findings: Findings) -> None:
    lines = [
        f"node {each.node} GPU {index}: {_gpu(gpu)}"
        for each in _first_ranks(facts)
        for index, gpu in enumerate(each.gpus)
    ]
    findings.show("GPUs", lines or ["none"])


def show_links(exchange: Exchange, findings: Findings, *, folder: str | None) -> None:
    """The section `ranks` of a complete exchange, and what is wrong with it."""
    nodes = _first_ranks(exchange.facts)
    reports = {report.rank: report for report in exchange.reports}
    lines = [f"{counted(len(exchange.facts), 'rank')} on {counted(len(nodes), 'node')}"]
    lines += [f"node {each.node}: {each.host_name}{_clock(each, reports)}" for each in nodes]
    lines += [_backend(name, exchange) for name in (GLOO, NCCL)]
    place = f" ('{folder}' here)" if folder is not None else ""
    seen = {each.sees_shared_file for each in exchange.reports} - {None}
    if seen == {True}:
        lines.append(f"run folder: shared by all nodes with learners{place}")
    findings.show("ranks", lines)
    findings.errors += map(SpeedAsyncError, _link_errors(exchange, place))
    for each in nodes:
        offset_s, bound_s = _offset(reports.get(each.rank))
        if abs(offset_s) - bound_s > MAX_OFFSET_S:
            findings.warnings.append(
                f"the clock of node {each.node} ({each.host_name}) differs by {offset_s:+.1f} s "
                "from that of node 0, so the times in their logs cannot be compared: synchronise "
                "both (for example with chrony)"
            )


def missing_ranks(
    exchange: Exchange, job: RankJob, *, num_nodes: int, failed: Collection[int] = ()
) -> Iterator[str]:
    """Yield an error for each node that did not answer, and for each one that lacks some ranks.

    `job`: that of a rank of this node. `failed`: ranks of this node that have an error already.
    """
    by_node: dict[int, list[int]] = {}
    for rank in exchange.missing:
        by_node.setdefault(rank // job.local_world_size, []).append(rank)
    own = job.rank // job.local_world_size
    absent = [node for node, ranks in by_node.items() if len(ranks) == job.local_world_size]
    num_present, limit = num_nodes - len(absent), f"within {job.timeout_s:g} s"
    for node, ranks in by_node.items():
        if node == own:
            if late := sorted({*ranks} - {*failed}):
                yield (
                    f"{_ranks(late)} on this node did not reach rank 0 {limit}, and it went on "
                    "without: start all nodes at the same time, or set a longer --timeout"
                )
        elif node in absent:
            yield (
                f"{num_present} of {counted(num_nodes, 'node')} answered {limit}: node {node} is "
                f"missing; start `speed-async doctor ... --node-rank {node}` there with the other "
                f"arguments as here, and open port {job.port} from it to {job.host}"
            )
        else:
            yield (
                f"{_ranks(ranks)} on node {node} did not answer {limit}: see the output of "
                "`speed-async doctor` there, or set a longer --timeout"
            )


def _link_errors(exchange: Exchange, place: str) -> Iterator[str]:
    if exchange.silent:
        yield (
            f"{_ranks(exchange.silent)} connected and then did not report: see the output of "
            "`speed-async doctor` on that node"
        )
    for backend, remedy in (
        (GLOO, "if that is not reachable, set GLOO_SOCKET_IFNAME"),
        (NCCL, "set NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO for its log"),
    ):
        failed = {
            each.rank: fault for each in exchange.reports if (fault := each.faults.get(backend))
        }
        if failed:
            first = failed[min(failed)]
            yield (
                f"{backend} failed on {_ranks([*failed])} ({first}): ranks connect to each other "
                "at any free port, on the interface of the route to cluster.host; allow all TCP "
                f"ports between the nodes, and {remedy}"
            )
    blind = [each.rank for each in exchange.reports if each.sees_shared_file is False]
    if blind:
        yield (
            f"{_ranks(blind)} cannot see a file that rank 0 made for this test beside run.folder"
            f"{place}: learners on several nodes need a run.folder on a file "
            "system that all of them share"
        )


def _backend(name: str, exchange: Exchange) -> str:
    durations = [each.all_reduce_s[name] for each in exchange.reports if name in each.all_reduce_s]
    shown = {GLOO: "gloo", NCCL: "NCCL"}[name]
    if len(durations) < len(exchange.facts):
        if len(exchange.facts) == 1:
            return f"{shown}: not measured, there is one rank"
        if name == NCCL and not all(each.has_own_gpu for each in exchange.facts):
            return f"{shown}: not measured, not every rank has a GPU of its own"
        return f"{shown}: failed"
    num_bytes, slowest_s = ALL_REDUCE_BYTES[name], max(durations)
    text = (
        f"{shown}: all-reduce of {size(num_bytes)} in {1e3 * slowest_s:.1f} ms "
        f"({num_bytes / slowest_s / 1e9:.2f} GB/s)"
    )
    trips = {r.rank: r.round_trip_s for r in exchange.reports if r.round_trip_s is not None}
    if name == GLOO and trips:
        slowest = max(trips, key=lambda rank: trips[rank])
        text += f", round trip to rank 0 at most {1e3 * trips[slowest]:.2f} ms (rank {slowest})"
    return text


def _clock(node: RankFacts, reports: Mapping[int, RankReport]) -> str:
    if node.node == 0 or (report := reports.get(node.rank)) is None:
        return ""
    offset_s, bound_s = _offset(report)
    return f", clock {1e3 * offset_s:+.2f} ms (within {1e3 * bound_s:.2f} ms) from node 0"


def _offset(report: RankReport | None) -> tuple[float, float]:
    """Offset and its uncertainty in seconds; both 0 for rank 0, or if not measured."""
    if report is None or report.clock_offset_s is None or report.round_trip_s is None:
        return 0.0, 0.0
    return report.clock_offset_s, report.round_trip_s / 2


def _first_ranks(facts: Sequence[RankFacts]) -> list[RankFacts]:
    """The first rank that answered of each node."""
    first: dict[int, RankFacts] = {}
    for each in sorted(facts, key=lambda each: each.rank):
        first.setdefault(each.node, each)
    return list(first.values())


def _release(facts: RankFacts, name: str) -> str | None:
    """The version without the build after `+`, as in 2.13.0+cpu; None if it is not installed."""
    version = facts.versions.get(name, ABSENT)
    return None if version == ABSENT else version.partition("+")[0]


def _difference(
    name: str, nodes: Sequence[RankFacts], value_of: Callable[[RankFacts], str | None]
) -> str:
    """Names the values of all nodes if they differ; a node that has none is not compared."""
    known = [(value, each) for each in nodes if (value := value_of(each)) is not None]
    if len({value for value, _ in known}) < 2:
        return ""
    listed = [f"{value} on node {each.node} ({each.host_name})" for value, each in known]
    return f"{name} differs between nodes: {', '.join(listed)}"


def _gpu(gpu: Gpu) -> str:
    bfloat16 = "bfloat16" if gpu.has_bfloat16 else "no bfloat16"
    return (
        f"{gpu.name}, {size(gpu.free_bytes)} free of {size(gpu.total_bytes)}, compute capability "
        f"{gpu.capability}, {bfloat16}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
