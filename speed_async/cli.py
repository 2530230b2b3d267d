"""The `speed-async` command. Heavy modules are imported only by the commands that need them."""

import sys

import click

from speed_async import __version__
from speed_async.commands.data import data
from speed_async.commands.doctor import doctor
from speed_async.commands.evaluation import compare_command, evaluate_command
from speed_async.commands.export import export_command
from speed_async.commands.runs import actor, console, keys
from speed_async.commands.training import check, show_config, train
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.exit_status import exit_status
from speed_async.launcher.standard_streams import discard_stdout, open_standard_streams


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="speed-async")
def commands() -> None:
    """Asynchronous actor-learner RL for reasoning models, with pass-rate screening."""


COMMANDS = (
    train,
    evaluate_command,
    compare_command,
    export_command,
    data,
    check,
    doctor,
    show_config,
    console,
    actor,
    keys,
)
for command in COMMANDS:
    commands.add_command(command)


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
