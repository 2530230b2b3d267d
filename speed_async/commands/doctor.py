"""The command `doctor`."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from speed_async.commands.training import (
    PASS_THROUGH,
    WithOverrides,
    download_nothing,
    examine,
    node_options,
)
from speed_async.config.load import examine_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, NotDownloaded, SpeedAsyncError
from speed_async.launcher.exit_status import EXIT_FAILED
from speed_async.launcher.preflight.findings import Findings, report
from speed_async.launcher.rank import Node, node_of

DEFAULT_RANKS = 2
"""Ranks without a configuration: the fewest that can form a group."""


@click.command(cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@node_options
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    metavar="SECONDS",
    help="Longest wait of the nodes for each other, and of one measurement.  [default: 30]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    config: str | None,
    overrides: tuple[str, ...],
    nnodes: int,
    node_rank: int,
    nproc_per_node: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Diagnose this machine, and with CONFIG all machines of a run.

    Shows versions, the machine and its GPUs, and starts one process per rank: they form a gloo
    group (and an NCCL group if each has a GPU), measure it, and compare the nodes. With CONFIG, it
    also reports everything that `check` does. On several nodes, start it on each of them at the
    same time, with the options of `train`, while no run uses the ports. The exit status is 0
    without errors, else 1.
    """
    if config is None and nnodes > 1:
        raise click.UsageError(
            "several nodes need a CONFIG with cluster.host and a port, at which they find each "
            "other: speed-async doctor CONFIG --nnodes N --node-rank R"
        )
    if config is not None and config.startswith("--"):
        raise click.UsageError(f"no CONFIG before '{config}': overrides need a CONFIG")
    from speed_async.launcher.doctor.diagnosis import diagnose

    download_nothing()
    # Code of a task may print, and stdout is for the JSON object.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if config is None:
            resolved, findings = None, Findings()
            node = Node(num_ranks=nproc_per_node or DEFAULT_RANKS)
        else:
            make_node = partial(
                node_of, num_nodes=nnodes, index=node_rank, num_ranks=nproc_per_node
            )
            resolved, node, findings = _check(config, overrides, make_node)
        diagnosis = diagnose(resolved, node, findings, timeout_s=timeout_s)
    found = diagnosis.findings
    click.echo(
        json.dumps(_as_record(found, diagnosis.measured), indent=2) if as_json else report(found)
    )
    sys.exit(EXIT_FAILED if found.errors else 0)


def _check(
    path: str, overrides: Sequence[str], make_node: Callable[[Config], Node]
) -> tuple[Config | None, Node | None, Findings]:
    """What `check` finds; without a node if the configuration or the options are unusable."""
    try:
        resolved, errors = examine_config(path, overrides)
        node, findings = examine(resolved, errors, make_node)
    except SpeedAsyncError as error:
        return None, None, Findings(errors=[error])
    findings.set_aside(NotDownloaded)
    return resolved, node, findings


def _as_record(findings: Findings, measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "ok": not findings.errors,
        "errors": [_error(error) for error in findings.errors],
        "warnings": findings.warnings,
        "not_checked": [_error(error) for error in findings.not_checked],
        "sections": dict(findings.sections),
        "measured": measured,
    }


def _error(error: Exception) -> dict[str, Any]:
    record: dict[str, Any] = {"text": str(error)}
    if isinstance(error, ConfigError):
        record |= {"field": error.field, "value": _plain(error.value), "remedy": error.remedy}
    return record


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
