"""The list of commands."""

from click.testing import CliRunner

from speed_async.cli import commands


def test_every_command_is_described_by_a_whole_sentence() -> None:
    shown = CliRunner().invoke(commands, ["--help"]).output.partition("Commands:\n")[2].splitlines()
    assert len(shown) == len(commands.commands)
    assert [line for line in shown if not line.endswith(".") or line.endswith("...")] == []
