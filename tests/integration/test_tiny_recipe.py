"""The tiny recipe of examples/recipes/: its problems, its model, and a short run with both."""

import importlib.util
import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakes.paths import REPOSITORY
from tests.fakes.run_process import DEADLINE_S, start_train
from tests.fakes.vllm_setup import NEEDS_VLLM

FOLDER = REPOSITORY / "examples" / "recipes" / "tiny"
CONFIG = tomllib.loads((FOLDER / "config.toml").read_text())

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


@pytest.fixture
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_recipe_make", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture
def config(make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe for small files beside it, which it makes."""
    sizes = {"NUM_TRAIN": 200, "NUM_TEST": 20, "MAX_NUMBER": 2, "NUM_STEPS": 40}
    for name, value in sizes.items():
        monkeypatch.setattr(make, name, value)
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path)])
    make.main()
    config = tmp_path / "own.toml"
    config.write_text(OWN.format(recipe=FOLDER / "config.toml"))
    return config


ENGINES = [
    "torch",
    pytest.param("vllm", marks=[*NEEDS_VLLM, pytest.mark.timeout(1800)]),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_recipe_trains_and_evaluates_from_files_of_the_schema_of_gsm8k(
    config: Path, tmp_path: Path, engine: str
) -> None:
    arguments = ("--actors.engine", engine, "--actors.vllm.enforce_eager", "true")
    run = start_train(tmp_path, "--run.updates", "2", *arguments, config=config)
    status, _, err = run.finish(2 * DEADLINE_S)
    assert status == 0, err
    assert run.summary()["policy_version"] == 2
    evaluated = [
        (each["suite"], each["policy_version"], each["num_completions"])
        for each in run.events("suite")
    ]
    assert evaluated == [("test", 0, 10), ("test", 2, 10)]
    command = [sys.executable, "-m", "speed_async", "eval", str(run.folder), "--engine", "torch"]
    done = subprocess.run(
        [*command, "--suite", f"test={tmp_path / 'test.jsonl'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    [results] = (run.folder / "evaluation").rglob("results.json")
    assert "test" in json.dumps(json.loads(results.read_text()))
