"""The tiny recipe of examples/recipes/: its problems, its model, and a short run with both."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakes.paths import REPOSITORY
from tests.fakes.run_process import DEADLINE_S, Run, start_train
from tests.fakes.vllm_setup import NEEDS_VLLM

FOLDER = REPOSITORY / "examples" / "recipes" / "tiny"
CONFIG = tomllib.loads((FOLDER / "config.toml").read_text())

VLLM = ("--actors.engine", "vllm", "--actors.vllm.enforce_eager", "true")

OWN = """
base = "{recipe}"
[run]
folder = "run"
[model]
path = "model"
[task]
path = "train.jsonl"
num_held_out = 20
[learner]
groups_per_update = 2
[[evaluate.suites]]
name = "test"
path = "test.jsonl"
num_prompts = 10
"""


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_recipe_make", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make() -> ModuleType:
    return load_make()


def test_the_problems_are_right_distinct_and_in_the_schema_of_gsm8k(make: ModuleType) -> None:
    rows = make.draw_rows(random.Random(0), 300)
    assert len({row["question"] for row in rows}) == 300
    kinds = set()
    for row in rows:
        assert row.keys() == {"question", "answer"}
        [(left, symbol, right, result)] = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>", row["answer"])
        expected = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }[symbol]
        assert int(result) == expected
        assert row["answer"].endswith(f"\n#### {expected}")
        assert row["question"].count(left) >= 1 and row["question"].count(right) >= 1
        kinds.add(symbol)
    assert kinds == {"+", "-", "*"}


def test_the_model_is_small_and_pretrained_on_the_prompts_of_the_recipe(make: ModuleType) -> None:
    assert make.PROMPT.format(question="1 + 1?") == CONFIG["task"]["format"].replace(
        "{prompt}", "1 + 1?"
    )
    tokenizer = make.make_tokenizer(random.Random(0))
    assert make.make_model(tokenizer).num_parameters() <= 1_000_000
    text = "Any text: $\\frac{1}{23}$, \u00fc\u4e16."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("23") == ["2", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A completed run of the recipe with small files beside it, which it makes."""
    folder = tmp_path_factory.mktemp("recipe")
    make = load_make()
    sizes = {"NUM_TRAIN": 200, "NUM_TEST": 20, "MAX_NUMBER": 2, "NUM_STEPS": 40}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(make, name, value)
        patch.setattr(sys, "argv", ["make.py", str(folder)])
        make.main()
    config = folder / "own.toml"
    config.write_text(OWN.format(recipe=FOLDER / "config.toml"))
    run = start_train(folder, "--run.updates", "2", "--actors.engine", "torch", config=config)
    status, _, err = run.finish()
    assert status == 0, err
    return run


def evaluations(run: Run) -> list[tuple[str, int, int]]:
    return [
        (each["suite"], each["policy_version"], each["num_completions"])
        for each in run.events("suite")
    ]


@pytest.mark.xdist_group("tiny recipe")
def test_the_recipe_trains_and_evaluates_from_files_of_the_schema_of_gsm8k(trained: Run) -> None:
    folder = trained.folder.parent
    assert trained.summary()["policy_version"] == 2
    assert evaluations(trained) == [("test", 0, 10), ("test", 2, 10)]
    command = [sys.executable, "-m", "speed_async", "eval", str(trained.folder)]
    done = subprocess.run(
        [*command, "--engine", "torch", "--suite", f"test={folder / 'test.jsonl'}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    [results] = (trained.folder / "evaluation").rglob("results.json")
    assert "test" in json.dumps(json.loads(results.read_text()))


@pytest.mark.xdist_group("tiny recipe")
@pytest.mark.vllm
@pytest.mark.timeout(1800)
@NEEDS_VLLM[1]
def test_the_recipe_goes_on_with_vllm_from_its_checkpoint_also_when_vllm_is_killed(
    trained: Run, tmp_path: Path
) -> None:
    checkpoint = str(trained.folder / "checkpoints" / "version-000002")
    overrides = ("--model.path", checkpoint, "--run.folder", str(tmp_path / "run"))
    overrides += ("--run.updates", "100000", "--weights.deadline_s", "10")
    config = trained.folder.parent / "own.toml"
    run = start_train(tmp_path, *VLLM, *overrides, config=config)
    run.wait_for_steps(3)
    [core] = named("VLLM::EngineCor", set(run.processes()))
    workers = named("VLLM::Worker", {core})
    os.kill(core, signal.SIGKILL)

    def has_restarted() -> bool:
        [*cores] = named("VLLM::EngineCor", set(run.processes()))
        return bool(cores) and cores != [core] and run.events("step")[-1]["actors_alive"] == 1

    run.wait_for("another vLLM", has_restarted)
    run.wait_for_steps(len(run.events("step")) + 3)
    [*cores] = named("VLLM::EngineCor", set(run.processes()))
    workers += named("VLLM::Worker", set(cores))
    run.interrupt()
    status, _, err = run.finish()
    assert status == 130, err
    summary = run.summary()
    assert summary["ledger"]["closes"] is True
    assert summary["ledger"]["failures"]["actor lost"] >= 1
    assert summary["completions_trained"] > 0
    assert evaluations(run)[0] == ("test", 0, 10)
    assert run.processes() == {}
    assert not any(is_alive(process_id) for process_id in [core, *cores, *workers])


def named(name: str, run_ids: set[int]) -> list[int]:
    """Processes with this name whose parent belongs to the run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == name:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z" and int(stat[1]) in run_ids:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
