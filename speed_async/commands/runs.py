"""The commands for runs in progress: `keys`, `console` and `actor`."""

import sys
from pathlib import Path

import click

from speed_async.launcher.event_loop import run
from speed_async.launcher.ports import host_and_port

KEYS = click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="This client's folder of keys, for a run that has keys.",
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--client", metavar="NAME", help="Add a client to an existing key folder.")
def keys(folder: Path, client: str | None) -> None:
    """Create the keys of a run on several machines.

    They are needed if its sockets are reachable from other machines. Set cluster.keys to FOLDER on
    every node of the run. An actor or a console on another machine needs its own client key:
    --client creates FOLDER/clients/NAME; copy it to that machine and pass it as --keys. Every
    client whose key is in FOLDER/allowed can connect; keys can be added and removed during a run.
    """
    from speed_async.transport.key_making import add_client, make_keys

    if client is not None:
        click.echo(f"copy {add_client(folder, client)} to its machine, and pass it as --keys")
        return
    make_keys(folder)
    click.echo(f"created {folder}: set cluster.keys to it; keep it as secret as an ssh key")


@click.command()
@click.argument("run_folder_or_address")
@KEYS
def console(run_folder_or_address: str, keys: Path | None) -> None:
    """Watch a run, by its folder or the address of its feed.

    The address, tcp://HOST:PORT, is that of the metrics feed in logs/learner.log. Given its folder,
    the console also shows the history, and the last state of a run that has ended. Keys: q quits, s
    shows samples, h shows help. No key affects the run.
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


@click.command()
@click.option(
    "--join",
    "address",
    required=True,
    metavar="tcp://HOST:PORT",
    help="Address of the run's service; logs/learner.log of the run contains it.",
)
@click.option("--model", help="Model folder on this machine, or the id of a hub model.")
@click.option("--data", help="Data set on this machine, or the id of a hub data set.")
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
    model: str | None,
    data: str | None,
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
