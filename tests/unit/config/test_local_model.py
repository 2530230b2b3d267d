"""`model.path` as an id of the Hugging Face hub, found in a local cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speed_async.config.hub_id import is_hub_id, local_or_hub
from speed_async.config.local_model import model_folder

FIND = """
import sys
from speed_async.config.local_model import model_folder
from speed_async.errors import ConfigError
try:
    print(model_folder(sys.argv[1]), model_folder(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


def find(name: str, cache: Path) -> tuple[str, str]:
    """Standard output and error of a process: the library reads its variables when imported."""
    result = subprocess.run(
        [sys.executable, "-c", FIND, name],
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return result.stdout.strip(), result.stderr


def snapshot(cache: Path, name: str, *files: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_hub_model_is_found_in_the_cache_and_reported_once(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "org/model", "config.json", "model.safetensors")
    found, said = find("org/model", tmp_path)
    assert found == f"{folder} {folder}"
    assert said.count(f"model org/model: {folder} (from the cache)\n") == 1


@pytest.mark.parametrize("files", [None, ["README.md"]])
def test_a_model_that_is_nowhere_is_an_error_with_a_remedy(
    tmp_path: Path, files: list[str] | None
) -> None:
    if files is not None:
        snapshot(tmp_path, "org/other", *files)
    error, _ = find("org/other", tmp_path)
    assert "config field 'model.path' = 'org/other'" in error
    assert ("download it again" if files else "hf download org/other") in error


def test_a_folder_has_precedence_over_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_or_hub("org/model", tmp_path) == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert local_or_hub("org/model", tmp_path) == str(tmp_path / "org" / "model")
    assert local_or_hub("model", tmp_path) == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/model") == Path("org/model")


@pytest.mark.parametrize("text", ["/a/b", "./a/b", "../b", "a", "a/b/c", "~/a", "a/.."])
def test_other_paths_are_not_ids(text: str) -> None:
    assert not is_hub_id(text)
    assert is_hub_id("Qwen/Qwen2.5-Math-1.5B")
