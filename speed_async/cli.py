"""The `speed-async` command. Parses and hands over; imports nothing heavy before it must."""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import click

from speed_async import __version__
from speed_async.config.load import load_config
from speed_async.errors import SpeedAsyncError
from speed_async.runtime.event_loop import run

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="speed-async")
def commands() -> None:
    """Asynchronous actor-learner RL for reasoning models, with pass-rate screening."""


@commands.command(context_settings=PASS_ON)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train on this machine as CONFIG says. OVERRIDES look like --learner.lr 1e-4.

    Starts one learner and cluster.actors actors under torchrun's elastic launcher.
    """
    resolved = load_config(config, overrides)
    from speed_async.runtime.local import launch_local

    sys.exit(launch_local(resolved, [str(config), *overrides]))


@commands.command(name="config", context_settings=PASS_ON)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def show_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Print CONFIG as a run would resolve it: presets, defaults and OVERRIDES in full."""
    click.echo(load_config(config, overrides).model_dump_json(indent=2))


@commands.command()
@click.argument("address")
def console(address: str) -> None:
    """Watch a run: ADDRESS is its metrics feed, tcp://HOST:PORT (it stands in logs/learner.log)."""
    parts = urlsplit(address if "//" in address else f"tcp://{address}")
    if parts.hostname is None or parts.port is None:
        raise SpeedAsyncError(f"'{address}' is no feed address; it looks like tcp://HOST:PORT")
    from speed_async.runtime.console_role import follow_feed

    run(follow_feed(parts.hostname, parts.port, address))


def main() -> None:
    try:
        commands(standalone_mode=False)
    except SpeedAsyncError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
