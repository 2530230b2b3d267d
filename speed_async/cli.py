"""The `speed-async` command. Heavy modules are imported only by the commands that need them."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from speed_async import __version__
from speed_async.config.load import examine_config, load_config
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import ConfigError, ConfigErrors, RunFinished, SpeedAsyncError
from speed_async.launcher.attempt import check_resumable
from speed_async.launcher.event_loop import run
from speed_async.launcher.exit_status import exit_status
from speed_async.launcher.ports import host_and_port
from speed_async.launcher.preflight.findings import CHECKED
from speed_async.launcher.rank import Node, check_world, node_of
from speed_async.launcher.stages import log_stage, record_start
from speed_async.launcher.standard_streams import discard_stdout, open_standard_streams

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
KEYS = click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="This client's folder of keys, for a run that has keys.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="speed-async")
def commands() -> None:
    """Asynchronous actor-learner RL for reasoning models, with pass-rate screening."""


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


@commands.command(cls=WithOverrides, context_settings=PASS_THROUGH)
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
    "--nnodes",
    type=click.IntRange(min=1),
    default=1,
    help="Number of nodes; start this command on each of them.  [default: 1]",
)
@click.option(
    "--node-rank",
    type=click.IntRange(min=0),
    default=0,
    help="Rank of this node; the learner runs on node 0.  [default: 0]",
)
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    help="Ranks per node; rank 0 is the learner.  [default: cluster.learners plus cluster.actors, "
    "divided evenly among the nodes]",
)
def train(
    config: str | None,
    overrides: tuple[str, ...],
    run_folder: Path | None,
    nnodes: int,
    node_rank: int,
    nproc_per_node: int | None,
) -> None:
    """Train with the configuration CONFIG. OVERRIDES have the form --learner.lr 1e-4.

    Starts one learner and cluster.actors actors on this machine; with --nnodes and --node-rank,
    this node's share of them. With --resume there is no CONFIG: the run folder contains it. Some
    fields, such as run.updates, can be overridden on resume.
    """
    record_start()
    from speed_async.launcher.node_launcher import launch_node
    from speed_async.observability.panel.keyboard import preserve_terminal

    make_node = partial(node_of, num_nodes=nnodes, index=node_rank, num_ranks=nproc_per_node)
    if run_folder is None:
        if config is None:
            raise click.UsageError("give a CONFIG, or --resume RUN_DIR")
        (resolved, errors), arguments = examine_config(config, overrides), [config, *overrides]
        if resolved is None:
            raise ConfigErrors.of(errors)
    else:
        # With --resume the first argument is an override.
        overrides = (config, *overrides) if config is not None else ()
        resolved, errors = load_resumed(run_folder, overrides), []
        try:
            check_resumable(resolved)
        except RunFinished as finished:
            click.echo(finished)
            return
        arguments = ["--resume", str(run_folder), *overrides]
    node = _checked(resolved, errors, make_node, resume=run_folder is not None)
    os.environ[CHECKED] = "yes"
    log_stage(f"starting {node.num_ranks} processes; the learner loads PyTorch")
    with preserve_terminal():
        status = launch_node(resolved, arguments, node)
    sys.exit(status)


@commands.command(cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Check CONFIG within seconds, and show what a run with it would do.

    Runs every check on this machine that does not require loading the model, and writes nothing.
    The last line is `ok` (exit status 0) or the number of errors (1). `train` runs the same checks.
    """
    from speed_async.launcher.exit_status import EXIT_FAILED
    from speed_async.launcher.preflight.checks import run_checks
    from speed_async.launcher.preflight.findings import Findings
    from speed_async.launcher.preflight.report import report

    resolved, errors = examine_config(config, overrides)
    findings = run_checks(resolved, errors) if resolved else Findings(errors=list(errors))
    click.echo(report(findings))
    sys.exit(EXIT_FAILED if findings.errors else 0)


@commands.command(name="config", cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
def show_config(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print CONFIG as a run resolves it, with presets, defaults and OVERRIDES applied.

    The output is a configuration that `train` accepts, with a description of every field.
    """
    from speed_async.config.toml_text import to_toml

    resolved = load_config(config, overrides)
    click.echo(resolved.model_dump_json(indent=2) if as_json else to_toml(resolved), nl=as_json)


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--client", metavar="NAME", help="Add a client to an existing key folder.")
def keys(folder: Path, client: str | None) -> None:
    """Create FOLDER with the keys of a run whose sockets are reachable from other machines.

    Set cluster.keys to FOLDER on every node of the run. An actor or a console on another machine
    needs its own client key: --client creates FOLDER/clients/NAME; copy it to that machine and pass
    it as --keys. Every client whose key is in FOLDER/allowed can connect; keys can be added and
    removed during a run.
    """
    from speed_async.transport.key_making import add_client, make_keys

    if client is not None:
        click.echo(f"copy {add_client(folder, client)} to its machine, and pass it as --keys")
        return
    make_keys(folder)
    click.echo(f"created {folder}: set cluster.keys to it; keep it as secret as an ssh key")


@commands.command()
@click.argument("run_folder_or_address")
@KEYS
def console(run_folder_or_address: str, keys: Path | None) -> None:
    """Watch a run, given its folder or the address of its metrics feed, tcp://HOST:PORT.

    Given its folder, the console also shows the history, and the last state of a run that has
    ended. Keys: q quits, s shows samples, h shows help. No key affects the run.
    """
    from speed_async.launcher.roles.console_role import Source, watch
    from speed_async.launcher.roles.watched_run import watch_folder
    from speed_async.transport.curve import load_client_keys

    curve = load_client_keys(keys) if keys is not None else None
    folder = Path(run_folder_or_address).expanduser()
    if folder.is_dir():
        run(watch_folder(folder.resolve(), curve))
        return
    host, port = host_and_port(run_folder_or_address)
    run(watch(Source(host=host, port=port, title=run_folder_or_address, keys=curve)))


@commands.command()
@click.option(
    "--join",
    "address",
    required=True,
    metavar="tcp://HOST:PORT",
    help="Address of the run's service; logs/learner.log of the run contains it.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Model folder on this machine.")
@click.option("--data", type=click.Path(path_type=Path), help="Data file on this machine.")
@click.option(
    "--run-folder",
    type=click.Path(path_type=Path),
    help="Folder for this actor's logs.  [default: runs/actor-N]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the service to reply.",
)
@KEYS
def actor(
    address: str,
    model: Path | None,
    data: Path | None,
    run_folder: Path | None,
    timeout_s: float,
    keys: Path | None,
) -> None:
    """Add an actor to a run that is in progress.

    The actor receives the run's configuration and newest weights, works until the run ends, and is
    restarted if it is killed. Ctrl-C drains this actor only; the run continues. On a machine with
    several GPUs, CUDA_VISIBLE_DEVICES selects the one to use.
    """
    host, port = host_and_port(address)
    from speed_async.launcher.exit_status import EXIT_INTERRUPTED
    from speed_async.launcher.roles.joiner import join_run

    joining = join_run(
        host, port, model=model, data=data, run_folder=run_folder, timeout_s=timeout_s, keys=keys
    )
    sys.exit(0 if run(joining) else EXIT_INTERRUPTED)


def _checked(
    config: Config, errors: list[ConfigError], make_node: Callable[[Config], Node], *, resume: bool
) -> Node:
    """Run all checks and return this machine's node. Raises SpeedAsyncError with all errors."""
    from speed_async.launcher.preflight.checks import combine_errors, run_checks

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
        leads=node is None or node.index == 0,
    )
    if findings.errors or node is None:
        raise combine_errors(findings.errors)
    _warn(findings.warnings)
    if not findings.warnings and not resume:
        click.echo("preflight checks passed", err=True)
    return node


def _warn(warnings: Sequence[str]) -> None:
    """Print warnings before the console draws on the terminal."""
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def main() -> None:
    open_standard_streams()
    try:
        commands(standalone_mode=False)
    except SpeedAsyncError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(exit_status(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:  # such as `| head -1`
        discard_stdout()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
