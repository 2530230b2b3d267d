"""Every combination of the tables in examples/recipes/README.md is a valid run."""

import re
from pathlib import Path

import pytest

from tests.fakes.command_line import run_command
from tests.fakes.paths import REPOSITORY

RECIPES = REPOSITORY / "examples" / "recipes"
ELSEWHERE = {"model.path", "task.path", "evaluate.suites", "cluster.keys", "cluster.host"}
"""Fields whose values this machine need not have; vLLM is one more where it is not installed."""
WORLD_SIZES = {
    "1 GPU": 2,
    "1 GPU, adapters (LoRA)": 2,
    **{f"4 GPUs{kind}": 4 for kind in ("", ", 7B")},
    **{f"8 GPUs{kind}": 8 for kind in ("", ", 7B")},
    **{f"2 nodes of 8 GPUs{kind}": 16 for kind in ("", ", 7B")},
}


def table(heading: str) -> dict[str, list[str]]:
    """Rows of one table of the README: the first column, and the code in the second."""
    page = (RECIPES / "README.md").read_text()
    [rows] = re.findall(
        rf"^\| {heading} \| .*\n\| --- \| --- \|\n((?:\|.*\n)+)", page, re.MULTILINE
    )
    found = re.findall(r"^\| (.*?) \| (?:`(.*?)` )?\|$", rows, re.MULTILINE)
    assert len(found) == rows.count("\n")
    return {name: options.split() for name, options in found}


RECIPE_FILES = table("training set")
MODELS, ALGORITHMS, HARDWARE = table("model"), table("algorithm"), table("hardware")


def test_the_tables_list_every_recipe_and_what_the_issue_asks_for() -> None:
    files = {path.name for path in RECIPES.glob("*.toml")} - {"paper.toml"}
    assert {name for [name] in RECIPE_FILES.values()} == files
    assert len(MODELS) == 2 and len(ALGORITHMS) == 4
    assert HARDWARE.keys() == WORLD_SIZES.keys()


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPE_FILES)
def test_a_combination_passes_the_dry_run(
    recipe: str, model: str, algorithm: str, hardware: str, tmp_path: Path
) -> None:
    [name] = RECIPE_FILES[recipe]
    options = [*MODELS[model], *ALGORITHMS[algorithm], *HARDWARE[hardware]]
    options = ["192.0.2.1" if each == "NODE0" else each for each in options]
    status, out, err = run_command(tmp_path, "train", str(RECIPES / name), "--dry-run", *options)
    assert (status, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("ok")
    absent = set(re.findall(r"^not checked here: config field '([^']+)'", out, re.MULTILINE))
    assert absent <= ELSEWHERE | {"actors.engine"}
    [last_rank] = re.findall(
        r"(\d+) (?:is an actor|are actors) \(engine vllm\)$", out, re.MULTILINE
    )[-1:]
    assert int(last_rank) == WORLD_SIZES[hardware] - 1
    assert f"algorithm: {algorithm.lower()} (" in out
    assert f"updates: {100 if name == 'gsm8k.toml' else 400}, each of 16 prompts x 24" in out
    assert list(tmp_path.iterdir()) == []
