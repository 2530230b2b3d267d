"""Parts that a user adds, by import path or registered name."""

from pathlib import Path

import pytest

import speed_async as sa
from speed_async.config.extensions import import_part, registered_path
from speed_async.errors import ConfigError
from tests.fakes.paths import MODEL


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'[model]\npath = "{MODEL}"\n[task]\nname = "arithmetic"\n')
    return path


@sa.register_advantage("of this test")
def advantage(rewards: list[object]) -> list[object]:
    return rewards


def test_a_registered_name_becomes_its_import_path_in_the_configuration(config_file: Path) -> None:
    config = sa.load_config(config_file, ["--objective.advantage", "of this test"])
    assert config.objective.advantage == f"{__name__}:advantage"


def test_names_are_registered_by_kind() -> None:
    assert registered_path("policy_loss", "of this test") == "of this test"


def test_an_unknown_part_is_rejected_with_the_known_names(config_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'rloo', .*'grpo'.*or <module>:<name>; did you mean 'rlo"
    ):
        sa.load_config(config_file, ["--objective.advantage", "rlo"])


def test_what_other_processes_cannot_import_is_not_registered() -> None:
    with pytest.raises(ValueError, match="at the top level of a module"):
        sa.register_advantage("local")(lambda rewards: rewards)


@pytest.mark.parametrize("path", ["no_such_module:x", "json:no_such_name"])
def test_a_path_that_cannot_be_imported_names_the_field(path: str) -> None:
    with pytest.raises(ConfigError, match=r"objective\.advantage.*cannot be imported"):
        import_part("objective.advantage", path)
