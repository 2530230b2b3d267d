"""The commands `eval` and `compare`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from speed_async.launcher.evaluation.plan import Options

PROTOCOL_NAMES = ("speed-paper", "qwen-math", "greedy")


@click.command("eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("run_folder", metavar="[RUN_DIR]", required=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", metavar="DIR", help="Model folder to evaluate, instead of a run.")
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME,...",
    help="Suites: names of folders in data/ (written by `speed-async data prepare`), paths of data "
    "files or folders, or NAME=PATH.  [default: those of the protocol; for a run, its held-out "
    "prompts]",
)
@click.option(
    "--protocol",
    "protocol_name",
    type=click.Choice(PROTOCOL_NAMES),
    help="Named settings: prompt, temperature, samples per suite, suites.  [default: speed-paper; "
    "for a run, its own settings]",
)
@click.option("--engine", type=click.Choice(["torch", "vllm"]), help="[default: torch]")
@click.option("--samples", type=click.IntRange(min=1), metavar="K", help="Samples per prompt.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="T", help="0 is greedy decoding."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N")
@click.option(
    "--format",
    "prompt_format",
    metavar="TEXT",
    help="Prompt text; {prompt} stands for the prompt of the suite.  [default: the protocol's]",
)
@click.option(
    "--match",
    type=click.Choice(["exact", "numeric", "math"]),
    help="How answers are compared.  [default: math]",
)
@click.option(
    "--num-prompts", type=click.IntRange(min=1), metavar="N", help="Only the first N of each suite."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for samples and results.  [default: runs/eval-MODEL-PROTOCOL; for a run, "
    "RUN_DIR/evaluation]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def evaluate_command(
    run_folder: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    suites: tuple[str, ...],
    protocol_name: str | None,
    engine: str | None,
    samples: int | None,
    temperature: float | None,
    max_new_tokens: int | None,
    prompt_format: str | None,
    match: Any,
    num_prompts: int | None,
    out: Path | None,
    seed: int,
) -> None:
    """Measure the accuracy of a model, or of all checkpoints of a run.

    Writes one JSON line per sample, results.json and a table. A command that was interrupted or
    killed continues when it is given again. Fields of the sections actors and model can be set as
    in `train`: --actors.slots 256 --actors.vllm.tensor_parallel 2.
    """
    from speed_async.evaluation.protocols import PROTOCOLS
    from speed_async.launcher.evaluation.plan import Options

    if run_folder is not None and run_folder.startswith("--"):  # an override, without RUN_DIR
        overrides, run_folder = (run_folder, *overrides), None
    if (run_folder is None) == (model is None):
        raise click.UsageError("give a RUN_DIR, or --model DIR with --suite")
    options = Options(
        suites=suites,
        engine=engine,
        samples=samples,
        temperature=temperature,
        protocol=PROTOCOLS[protocol_name] if protocol_name else None,
        max_new_tokens=max_new_tokens,
        format=prompt_format,
        match=match,
        num_prompts=num_prompts,
        out=out,
        seed=seed,
        overrides=overrides,
    )
    _evaluate(Path(run_folder) if run_folder else None, model, options)


def _evaluate(run_folder: Path | None, model: str | None, options: "Options") -> None:
    from rich.console import Console

    from speed_async.launcher.evaluation.plan import plan_model
    from speed_async.launcher.evaluation.run_checkpoints import plan_run_folder
    from speed_async.launcher.roles.engine_environment import engine_environment

    options.check()
    if run_folder is not None:
        plan = plan_run_folder(run_folder, options)
    else:
        assert model is not None
        plan = plan_model(model, options)
    plan.check()
    # Before torch is imported.
    os.environ.update(engine_environment(plan.targets[0].config))
    from speed_async.evaluation.table import results_table
    from speed_async.launcher.evaluation.evaluation import Interrupted, evaluate
    from speed_async.launcher.exit_status import EXIT_INTERRUPTED

    shown = os.fdopen(os.dup(2), "w")  # stderr is redirected to a log during the evaluation
    folders = ", ".join(str(target.out) for target in plan.targets)
    try:
        results = evaluate(plan, seed=options.seed, console=Console(file=shown))
    except (Interrupted, KeyboardInterrupt):
        click.echo(
            f"interrupted; the samples so far are in {folders}: run the same command to continue",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    Console().print(results_table(results))
    click.echo(f"samples and results.json: {folders}")


@click.command("compare")
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME,...",
    help="Suites to compare.  [default: all]",
)
def compare_command(first: Path, second: Path, suites: tuple[str, ...]) -> None:
    """Compare two evaluations on the same prompts.

    A and B are folders with a results.json, such as RUN_DIR/evaluation/version-000020. The interval
    of the difference is that of a paired bootstrap.
    """
    from rich.console import Console

    from speed_async.evaluation.compare import compare, comparison_table

    names = [name for each in suites for name in each.split(",") if name]
    Console().print(comparison_table(compare(first, second, names)))
