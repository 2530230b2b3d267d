"""`speed-async config` and `--help`: their output matches the accepted configuration."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from speed_async.config.load import build_config, load_config
from speed_async.config.names import all_fields
from speed_async.config.schema import Algorithm
from speed_async.config.toml_text import to_toml
from tests.fakes.paths import MODEL
from tests.fakes.run_process import write_config


def command(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "speed_async", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_config_output_is_a_valid_configuration_file(tmp_path: Path) -> None:
    source = write_config(tmp_path)
    overrides = ["--learner.lr", "3e-5", "--actors.vllm.enforce_eager", "true"]
    printed = tmp_path / "elsewhere" / "out.toml"
    printed.parent.mkdir()
    printed.write_text(command(tmp_path, "config", str(source), *overrides))
    assert load_config(printed) == load_config(source, overrides)
    assert "# Updates of the whole run" in printed.read_text()
    assert command(tmp_path, "check", str(printed)).endswith("\nok\n")


def test_config_prints_json_with_the_json_option(tmp_path: Path) -> None:
    source = write_config(tmp_path)
    resolved = json.loads(command(tmp_path, "config", str(source), "--json", "--run.seed", "4"))
    assert build_config(resolved) == load_config(source, ["--run.seed", "4"])


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_every_algorithm_round_trips(tmp_path: Path, algorithm: str) -> None:
    config = load_config(write_config(tmp_path), ["--algorithm", algorithm])
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_strings_numbers_and_tables_round_trip() -> None:
    options = {
        "a key": ["x", 1, 2.5, True, {"deep": [1]}],
        "quotes": "say \"it\" \\ 'so'\n\ttab \x00 \x7f é 😀",
        "size": 1e-300,
        "large": 1e22,
        "empty": {},
    }
    config = build_config(
        {
            "model": {"path": str(MODEL), "context_length": 96},
            "task": {"name": "arithmetic", "options": options},
            "actors": {"vllm": {"arguments": {"max_num_batched_tokens": 8192}}},
            "run": {"folder": "runs/ein Ordner/\u2028x", "stop_at_accuracy": 0.1 + 0.2},
            "observe": {"wandb_project": ""},
        }
    )
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_tables_of_rewards_round_trip(tmp_path: Path) -> None:
    rewards = '[{name = "correct"}, {name = "my_module:my_reward", weight = -0.5}]'
    config = load_config(write_config(tmp_path), ["--task.rewards", rewards])
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(config))
    again = load_config(printed)
    assert again == config
    assert [each.weight for each in again.task.weighted_rewards] == [1.0, -0.5]


def test_a_list_of_sections_round_trips(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "columns": {"prompt": "q.text"}, "weight": 1.0},
        {"path": "org/name", "format": "{prompt}\n\\boxed{}", "subset": "main", "weight": 2.5},
    ]
    config = build_config(
        {"model": {"path": str(MODEL)}, "task": {"name": "dataset", "sources": sources}}
    )
    assert [source.path for source in config.task.all_sources] == [s["path"] for s in sources]
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_the_help_of_train_lists_every_field(tmp_path: Path) -> None:
    help_text = " ".join(command(tmp_path, "train", "--help").split())
    for field in all_fields():
        section, _, name = field.rpartition(".")
        _, _, listed = help_text.partition(f" --{section}. " if section else " -- ")
        assert name in listed.partition(" --")[0], field
