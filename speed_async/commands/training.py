"""The commands `train`, `check` and `config`."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from speed_async.config.load import examine_config, load_config
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import (
    ConfigError,
    ConfigErrors,
    NotAvailableHere,
    NotDownloaded,
    RunFinished,
)
from speed_async.launcher.attempt import check_resumable
from speed_async.launcher.preflight.findings import CHECKED, Findings, report
from speed_async.launcher.rank import Node, check_world, node_of
from speed_async.launcher.stages import log_stage, record_start

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}


class WithOverrides(click.Command):
    """A command whose help lists all fields that can be overridden."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from speed_async.config.names import fields_by_section

        with formatter.section("Overrides, each as --section.field value"):
            formatter.write_dl(
                [(section, ", ".join(fields)) for section, fields in fields_by_section().items()]
            )
        with formatter.indentation():
            formatter.write_text("`speed-async config CONFIG` prints their meaning.")


def node_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that divide the ranks of a run among nodes."""
    options = (
        click.option(
            "--nnodes",
            type=click.IntRange(min=1),
            default=1,
            help="Number of nodes; start this command on each of them.  [default: 1]",
        ),
        click.option(
            "--node-rank",
            type=click.IntRange(min=0),
            default=0,
            help="Rank of this node; the learner runs on node 0.  [default: 0]",
        ),
        click.option(
            "--nproc-per-node",
            type=click.IntRange(min=1),
            help="Ranks per node; rank 0 is the learner.  [default: cluster.learners plus "
            "cluster.actors, divided evenly among the nodes]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--resume",
    "run_folder",
    metavar="RUN_DIR",
    type=click.Path(path_type=Path),
    help="Resume the run in this folder from its newest complete checkpoint.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and print what the run would do; start and write nothing.",
)
@node_options
def train(
    config: str | None,
    overrides: tuple[str, ...],
    run_folder: Path | None,
    dry_run: bool,
    nnodes: int,
    node_rank: int,
    nproc_per_node: int | None,
) -> None:
    """Train with the configuration CONFIG. OVERRIDES have the form --learner.lr 1e-4.

    Starts one learner and cluster.actors actors on this machine; with --nnodes and --node-rank,
    this node's share of them. With --resume there is no CONFIG: the run folder contains it. Some
    fields, such as run.updates, can be overridden on resume.

    --dry-run runs the same checks and starts nothing. What this machine lacks (GPUs, a model that
    is not downloaded, data that is not prepared) is listed as not checked and is no error. The exit
    status is 0 without errors, else 1.
    """
    record_start()
    make_node = partial(node_of, num_nodes=nnodes, index=node_rank, num_ranks=nproc_per_node)
    if run_folder is None:
        if config is None:
            raise click.UsageError("give a CONFIG, or --resume RUN_DIR")
        (resolved, errors), arguments = examine_config(config, overrides), [config, *overrides]
    else:
        if config is not None and not config.startswith("--"):
            raise click.UsageError(
                f"--resume {run_folder} takes no CONFIG, and '{config}' was given: remove it, the "
                "run folder contains the configuration; --section.field value changes a field"
            )
        # With --resume the first argument is an override.
        overrides = (config, *overrides) if config is not None else ()
        resolved, errors = load_resumed(run_folder, overrides), []
        if node_rank == 0:  # its learner locks the run, perhaps before another node comes here
            try:
                check_resumable(resolved)
            except RunFinished as finished:
                click.echo(finished)
                return
        arguments = ["--resume", str(run_folder), *overrides]
    if dry_run:
        download_nothing()
    node, findings = examine(resolved, errors, make_node, resume=run_folder is not None)
    if dry_run:
        findings.set_aside(NotAvailableHere)
        _print_and_exit(findings)
    if resolved is None:
        raise ConfigErrors.of(errors)
    _start(resolved, arguments, node, findings, resume=run_folder is not None)


@click.command(cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@node_options
def check(
    config: str,
    overrides: tuple[str, ...],
    nnodes: int,
    node_rank: int,
    nproc_per_node: int | None,
) -> None:
    """Check CONFIG for this machine, and show what a run would do.

    Runs every check that does not require loading the model, within seconds, and writes nothing.
    The last line begins with `ok` (exit status 0) or has the number of errors (1). `train` runs the
    same checks. In contrast to `train --dry-run`, what this machine lacks is an error.
    """
    make_node = partial(node_of, num_nodes=nnodes, index=node_rank, num_ranks=nproc_per_node)
    download_nothing()
    _, findings = examine(*examine_config(config, overrides), make_node)
    findings.set_aside(NotDownloaded)
    _print_and_exit(findings)


@click.command(name="config", cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
def show_config(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print CONFIG as a run resolves it.

    Presets, defaults and OVERRIDES are applied. The output is a configuration that `train` accepts,
    with a description of every field.
    """
    from speed_async.config.toml_text import to_toml

    resolved = load_config(config, overrides)
    click.echo(resolved.model_dump_json(indent=2) if as_json else to_toml(resolved), nl=as_json)


def examine(
    config: Config | None,
    errors: list[ConfigError],
    make_node: Callable[[Config], Node],
    *,
    resume: bool = False,
) -> tuple[Node | None, Findings]:
    """Run all checks. Returns this machine's node and the findings; no node if it is invalid."""
    from speed_async.launcher.preflight.checks import run_checks
    from speed_async.launcher.preflight.plan import describe_run

    if config is None:
        return None, Findings(errors=list(errors))
    node = None
    try:
        node = make_node(config)
        check_world(config, node.rank(0))
    except ConfigError as error:
        errors = [*errors, error]
    findings = run_checks(
        config,
        errors,
        resume=resume,
        actors_here=node is None or node.num_nodes == 1,
        first_rank=0 if node is None else node.rank(0).rank,
        num_local_ranks=None if node is None else node.num_ranks,
    )
    if node is not None:
        findings.sections.insert(0, ("run", describe_run(config, node)))
    return node, findings


def download_nothing() -> None:
    """Let the libraries of the Hugging Face hub use their cache only; they read this at import."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def _print_and_exit(findings: Findings) -> NoReturn:
    from speed_async.launcher.exit_status import EXIT_FAILED

    click.echo(report(findings))
    sys.exit(EXIT_FAILED if findings.errors else 0)


def _start(
    config: Config, arguments: list[str], node: Node | None, findings: Findings, *, resume: bool
) -> NoReturn:
    """Start the run and exit with its status. Raises SpeedAsyncError with all errors."""
    from speed_async.launcher.node_launcher import launch_node
    from speed_async.launcher.preflight.checks import combine_errors
    from speed_async.observability.panel.keyboard import preserve_terminal

    if findings.errors or node is None:
        raise combine_errors(findings.errors)
    _warn(findings.warnings)
    if not findings.warnings and not resume:
        click.echo("preflight checks passed", err=True)
    os.environ[CHECKED] = "yes"
    log_stage(f"starting {node.num_ranks} processes; the learner loads PyTorch")
    with preserve_terminal():
        status = launch_node(config, arguments, node)
    sys.exit(status)


def _warn(warnings: Sequence[str]) -> None:
    """Print warnings before the console draws on the terminal."""
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
