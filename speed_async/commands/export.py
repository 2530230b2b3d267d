"""The command `export`."""

from pathlib import Path

import click

from speed_async.config.load import read_resolved
from speed_async.config.schema import Config
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.run_folder import RunFolder

DTYPES = ("bfloat16", "float16", "float32")


@click.command("export")
@click.argument("source", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True)
@click.option(
    "--checkpoint",
    metavar="NAME",
    help="A version, such as 40, or best-SUITE, such as best-math500.  [default: the newest]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Convert all weights, from the float32 values of training; with adapters, from the merged "
    "weights of the checkpoint.  [default: those of the initial model]",
)
@click.option(
    "--adapter",
    is_flag=True,
    help="Write only the adapters of a run with learner.lora_rank, in the format of peft.",
)
def export_command(
    source: Path, out: Path, checkpoint: str | None, dtype: str | None, adapter: bool
) -> None:
    """Write a checkpoint as a Hugging Face model folder.

    RUN_DIR is a run folder or one of its checkpoints. DIR gets the weights, the configuration and
    the tokenizer, without the training state, after the checksums were verified. Adapters are
    merged into the weights, except with --adapter.
    """
    if adapter and dtype:
        raise click.UsageError("--adapter writes float32: remove --dtype")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from speed_async.learner.checkpoint.export import export, find_checkpoint
    from speed_async.learner.checkpoint.export_adapter import export_adapter

    disable_progress_bar()
    found = find_checkpoint(source, checkpoint)
    try:
        if adapter:
            export_adapter(found, out, _run_config(found))
        else:
            export(found, out, getattr(torch, dtype) if dtype else None)
    except OSError as error:
        raise SpeedAsyncError(f"'{out}' cannot be written: {error}") from error
    click.echo(f"exported {found} to {out}")


def _run_config(checkpoint: Path) -> Config:
    """Raises SpeedAsyncError if the checkpoint is not in a run folder."""
    path = RunFolder(path=checkpoint.resolve().parents[1]).config
    if not path.is_file():
        raise SpeedAsyncError(
            f"--adapter reads the settings of the run, and '{path}' does not exist: give the run "
            "folder or a checkpoint in it"
        )
    return read_resolved(path)
