"""Diagnoses the machines of a run: versions, this machine, and the ranks of all nodes together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from speed_async.config.cuda import gpu_memory_bytes
from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.doctor.comparison import (
    compare_nodes,
    missing_ranks,
    show_gpus,
    show_links,
)
from speed_async.launcher.doctor.jobs import CannotListen, prepared_jobs, store_port
from speed_async.launcher.doctor.machine import check_machine, read_machine
from speed_async.launcher.doctor.ranks import RankEnd, run_jobs
from speed_async.launcher.doctor.records import Exchange, RankJob
from speed_async.launcher.doctor.versions import check_versions
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.machine import size
from speed_async.launcher.rank import Node


@dataclass(kw_only=True, slots=True)
class Diagnosis:
    findings: Findings
    measured: dict[str, Any] = field(default_factory=dict)
    """Figures for programs, in the units that their names end with."""


def diagnose(
    config: Config | None, node: Node | None, findings: Findings, *, timeout_s: float
) -> Diagnosis:
    """Add to the findings of the preflight checks what this machine and the ranks show.

    `config`: None without a configuration, or if it is invalid; there is no `node` in that case.
    `timeout_s`: longest wait of the ranks for each other.
    """
    own = Findings()
    versions, machine = check_versions(own), read_machine()
    check_machine(machine, own)
    measured = {"versions": versions, "machine": asdict(machine)}
    ranks = Findings()
    if node is None:
        _show_local_gpus(ranks)
        ranks.show("ranks", ["not started: the configuration has errors"])
    else:
        measured |= _diagnose_ranks(config, node, ranks, timeout_s)
    parts = (own, findings, ranks)
    return Diagnosis(
        findings=Findings(
            errors=[error for part in parts for error in part.errors],
            warnings=[warning for part in parts for warning in part.warnings],
            not_checked=[each for part in parts for each in part.not_checked],
            sections=[section for part in parts for section in part.sections],
        ),
        measured=measured,
    )


def _diagnose_ranks(
    config: Config | None, node: Node, findings: Findings, timeout_s: float
) -> dict[str, Any]:
    port = store_port(config, node)
    if port is None:
        _show_local_gpus(findings)
        reason = "the other nodes need cluster.host and a port to reach it (see the errors)"
        findings.show("ranks", [f"not started: {reason}"])
        return {}
    try:
        with prepared_jobs(config, node, port=port, timeout_s=timeout_s) as (jobs, listener):
            ends = run_jobs(jobs, listener)
    except CannotListen as error:
        _show_local_gpus(findings)
        findings.errors.append(error)
        return {}
    return _report(jobs[0], ends, node, findings)


def _report(
    job: RankJob, ends: Sequence[RankEnd], node: Node, findings: Findings
) -> dict[str, Any]:
    """Report the result of the first rank of this node that has one. All ranks know the same."""
    for end in ends:
        if end.result is None:
            findings.errors.append(SpeedAsyncError(f"rank {end.rank} on this node {end.fault}"))
    results = [end.result for end in ends if end.result is not None]
    findings.errors += map(SpeedAsyncError, sorted({each.fault for each in results if each.fault}))
    failed = [end.rank for end in ends if end.result is None or end.result.fault]
    complete = [each for each in results if each.fault is None]
    if not complete:
        _show_local_gpus(findings)
        return {}
    exchange = complete[0]
    show_gpus(exchange.facts, findings)
    compare_nodes(exchange.facts, findings)
    for text in missing_ranks(exchange, job, num_nodes=node.num_nodes, failed=failed):
        findings.errors.append(SpeedAsyncError(text))
    if exchange.missing:
        findings.show("ranks", [f"{len(exchange.facts)} of {job.world_size} answered"])
    else:
        show_links(exchange, findings, folder=job.shared_folder)
    return {"ranks": _figures(exchange)}


def _figures(exchange: Exchange) -> list[dict[str, Any]]:
    reports = {report.rank: asdict(report) for report in exchange.reports}
    return [asdict(facts) | reports.get(facts.rank, {}) for facts in exchange.facts]


def _show_local_gpus(findings: Findings) -> None:
    sizes = gpu_memory_bytes()
    lines = [f"GPU {index}: {size(total)}" for index, total in enumerate(sizes)]
    findings.show("GPUs", lines or ["none"])
