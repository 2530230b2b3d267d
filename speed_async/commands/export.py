"""The command `export`."""

from pathlib import Path

import click

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
    help="Convert all weights, from the float32 values of training.  [default: those of the "
    "initial model]",
)
def export_command(source: Path, out: Path, checkpoint: str | None, dtype: str | None) -> None:
    """Write a checkpoint as a Hugging Face model folder.

    RUN_DIR is a run folder or one of its checkpoints. DIR gets the weights, the configuration and
    the tokenizer, without the training state, after the checksums were verified.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from speed_async.errors import SpeedAsyncError
    from speed_async.learner.checkpoint.export import export, find_checkpoint

    disable_progress_bar()
    found = find_checkpoint(source, checkpoint)
    try:
        export(found, out, getattr(torch, dtype) if dtype else None)
    except OSError as error:
        raise SpeedAsyncError(f"'{out}' cannot be written: {error}") from error
    click.echo(f"exported {found} to {out}")
