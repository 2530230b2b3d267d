"""The commands `data ...`: published data sets."""

from pathlib import Path

import click

from speed_async.commands.data_show import show


@click.group()
def data() -> None:
    """Prepare data sets, and look at prompts."""


@data.command()
@click.argument("name")
@click.option(
    "--from",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File of the publisher: parquet, JSON array, JSON lines or CSV, compressed or not; or a "
    "folder of such files.  [default: load the data set from the Hugging Face hub]",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the prepared data set.  [default: data/NAME]",
)
@click.option(
    "--decontaminate",
    metavar="SUITE_OR_DIR",
    multiple=True,
    help="Remove training problems that overlap with this prepared evaluation set: a folder, or a "
    "name beside --out. May be repeated, or several separated by commas.",
)
def prepare(name: str, path: Path | None, out: Path | None, decontaminate: tuple[str, ...]) -> None:
    """Prepare the published data set NAME.

    For training: gsm8k, math, deepscaler, dapo17k, numinamath. For evaluation: gsm8k-test, math500,
    amc23, aime24, aime25, dapo1k.

    Writes one parquet file with the columns prompt, answer, level, source and id, a data card
    (card.md, card.json), and the rows that cannot be used, with their reasons (rejects.jsonl).
    A folder that is up to date is left as it is. Prepare the evaluation sets first: the overlap
    of a training set with those beside it is reported.
    """
    from speed_async.environments.dataset.preparation.prepare import prepare as run
    from speed_async.environments.dataset.preparation.summary import summary

    suites = [each for given in decontaminate for each in given.split(",") if each]
    click.echo(summary(run(name, path=path, out=out, decontaminate=suites)))


data.add_command(show)
