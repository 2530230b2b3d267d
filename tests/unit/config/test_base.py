"""`base` in a configuration file: what is merged, and errors."""

from pathlib import Path

import pytest

from speed_async.config.load import load_config
from speed_async.errors import ConfigError

BASE = """
algorithm = "dapo"
[model]
path = "model"
[task]
name = "jsonl"
path = "data.jsonl"
[gate]
n_init = 3
n_cont = 5
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "data.jsonl").write_text("")
    (folder / "base.toml").write_text(BASE)
    return folder / "base.toml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_changes_single_values_of_its_base(base: Path, tmp_path: Path) -> None:
    text = 'base = "base/base.toml"\nalgorithm = "rloo"\n[gate]\nn_cont = 7\n[run]\nupdates = 9\n'
    config = load_config(write(tmp_path, "own.toml", text))
    assert (config.gate.n_init, config.gate.n_cont, config.run.updates) == (3, 7, 9)
    assert (config.algorithm, config.gate.mode) == ("rloo", "off")


def test_relative_paths_start_at_the_file_that_contains_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("")
    text = 'base = "base/base.toml"\n[task]\npath = "own.jsonl"\n'
    config = load_config(write(tmp_path, "own.toml", text))
    assert config.model.path == str(base.parent / "model")
    assert config.task.path == str(tmp_path / "own.jsonl")


def test_a_base_may_have_a_base_and_overrides_come_last(base: Path, tmp_path: Path) -> None:
    write(tmp_path, "middle.toml", f'base = "{base}"\n[gate]\nn_init = 6\nn_cont = 8\n')
    own = write(tmp_path, "own.toml", 'base = "middle.toml"\n[gate]\nn_cont = 9\n')
    gate = load_config(own, ["--gate.n_init", "2"]).gate
    assert (gate.n_init, gate.n_cont) == (2, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('base = "none.toml"', "no such file"),
        ("base = 3", "give the path of one TOML file, in quotes"),
        ('base = "own.toml"', "its own base (own.toml -> own.toml)"),
        ('base = "other.toml"', "its own base (own.toml -> other.toml -> own.toml)"),
    ],
)
def test_a_base_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path, "other.toml", 'base = "own.toml"')
    own = write(tmp_path, "own.toml", text)
    with pytest.raises(ConfigError) as raised:
        load_config(own)
    assert raised.value.field == "base"
    assert expected in str(raised.value)


def test_an_unreadable_base_is_named(tmp_path: Path) -> None:
    write(tmp_path, "broken.toml", "[model")
    own = write(tmp_path, "own.toml", 'base = "broken.toml"')
    with pytest.raises(ConfigError, match=r"broken\.toml.*not valid TOML"):
        load_config(own)
