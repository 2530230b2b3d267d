"""Suites in the configuration: names, paths, unknown keys."""

from pathlib import Path

import pytest

from speed_async.config.load import examine_config, load_config
from speed_async.config.toml_text import to_toml


def config_file(folder: Path, suites: str) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (folder / "rows.jsonl").touch()
    path = folder / "run.toml"
    path.write_text(f"[model]\npath = 'model'\n[task]\nname = 'arithmetic'\n{suites}")
    return path


def test_suites_are_read_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    suites = """
[[evaluate.suites]]
name = "hard"
path = "rows.jsonl"
samples = 4
temperature = 0.0
columns = { prompt = "question" }
[[evaluate.suites]]
name = "hub"
path = "org/name"
split = "test"
"""
    config = load_config(config_file(tmp_path, suites))
    hard, hub = config.evaluate.suites
    assert hard.path == str(tmp_path / "rows.jsonl")
    assert (hard.samples, hard.temperature, hard.every, hard.match) == (4, 0.0, 20, "math")
    assert hard.columns == {"prompt": "question"}
    assert (hub.path, hub.split) == ("org/name", "test")
    assert config.sampling("hard") == (0.0, 1.0)
    assert config.sampling("held_out") == config.sampling("") == (1.0, 1.0)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(to_toml(config))
    assert load_config(resolved) == config


@pytest.mark.parametrize(
    ("suites", "expected"),
    [
        (
            "[[evaluate.suites]]\nname = 'held_out'\npath = 'rows.jsonl'\n",
            "'held_out': this name is that of the task's own held-out prompts",
        ),
        (
            "[[evaluate.suites]]\nname = 'a'\npath = 'rows.jsonl'\n" * 2,
            "'a': this name is that of another suite",
        ),
        (
            "[[evaluate.suites]]\nname = 'a'\npath = 'missing.jsonl'\n",
            "missing.jsonl': no such file or folder; set the path of the data of suite 'a'",
        ),
        (
            "[[evaluate.suites]]\nname = 'a b'\npath = 'rows.jsonl'\n",
            "evaluate.suites.0.name' = 'a b'",
        ),
        (
            "[[evaluate.suites]]\nname = 'a'\npath = 'rows.jsonl'\ntemperatur = 1.0\n",
            "did you mean 'temperature'",
        ),
        (
            "[[evaluate.suites]]\nname = 'a'\npath = 'rows.jsonl'\ntemperature = -1.0\n",
            "give 0 or more",
        ),
    ],
)
def test_wrong_suites_are_refused(tmp_path: Path, suites: str, expected: str) -> None:
    _, errors = examine_config(config_file(tmp_path, suites))
    [error] = errors
    assert expected in str(error)
